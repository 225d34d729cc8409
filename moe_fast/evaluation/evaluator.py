"""Evaluates during training models that take a domain with every text.

sentence-transformers' own evaluators call ``encode`` without a domain: with a learned router, or a
``default_domain``, they are all that is needed, and give the numbers of this package. This one is
for the rest, and reports every domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from moe_fast.evaluation.result import ALL_DOMAINS, Bootstrap, Evaluation


class DomainEvaluator(BaseEvaluator):
    """An evaluator for sentence-transformers' trainer from one of the ``evaluate_*`` functions.

    Gives ``{name}_{domain}_{metric}`` for every domain and for ``all``, such as
    ``dev_all_ROC-AUC``, without intervals. `primary_metric` is the first metric over all.

    Args:
        evaluate: `evaluate_pairs`, `evaluate_retrieval` or `evaluate_sts`.
        data: what it takes beside the model.
        name: the beginning of the metrics' names; may be empty.
        metric: the one that chooses the best checkpoint; ``None``: the first.
        **options: the function's own, such as ``encode=EncodeOptions(truncate=True)``.
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
        """Called by the trainer.

        Raises:
            ValueError: `metric` is none of the function's, or as the function.
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
