"""Evaluates models with domains during training.

sentence-transformers' own evaluators call ``encode`` without a domain. They are sufficient for a
model with a learned router or a ``default_domain``, and give the same numbers as this package. The
evaluator here gives each text's domain to the model, and reports every domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from moe_fast.evaluation.result import ALL_DOMAINS, Bootstrap, Evaluation


class DomainEvaluator(BaseEvaluator):
    """Makes an evaluator for sentence-transformers' trainer from an ``evaluate_*`` function.

    It reports ``{name}_{domain}_{metric}`` for every domain and for ``all``, such as
    ``dev_all_ROC-AUC``, without intervals. Its `primary_metric`, which chooses the best checkpoint,
    is `metric` over all domains.

    Args:
        evaluate: `evaluate_pairs`, `evaluate_retrieval` or `evaluate_sts`.
        data: the data that this function takes after the model.
        name: the first part of the metrics' names; may be empty.
        metric: the metric that chooses the best checkpoint; ``None``: the function's first.
        **options: further arguments of the function, such as
            ``encode=EncodeOptions(truncate=True)``.
    """

    def __init__(
        self,
        evaluate: Callable[..., Evaluation],
        data: Any,
        *,
        name: str = "",
        metric: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.evaluate, self.data, self.name = evaluate, data, name
        self.metric, self.options = metric, options

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate the model; the trainer calls this.

        Returns:
            {metric's name: value}.

        Raises:
            ValueError: the function has no metric called `metric`.
            ValueError: as the function.
        """
        result = self.evaluate(model, self.data, bootstrap=Bootstrap(resamples=0), **self.options)
        over_all = result.scores[ALL_DOMAINS]
        metric = self.metric or next(iter(over_all))
        if metric not in over_all:
            raise ValueError(f"metric={metric!r}; allowed are {', '.join(over_all)}")
        self.primary_metric = f"{ALL_DOMAINS}_{metric}"
        metrics = {
            f"{group}_{name}": score.value
            for group, scores in result.scores.items()
            for name, score in scores.items()
        }
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics
