"""Predicting the domains of texts: fit_domain_predictor, predict_domain and domain="auto"."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_fast.encoding.domains import checked_domain
from moe_fast.encoding.lengths import TokenizedText, tokenize_texts
from moe_fast.encoding.prompts import prompt_of
from moe_fast.extras import require
from moe_fast.models.configuration import AUTO
from moe_fast.models.domain_predictor import (
    NAME,
    DomainPredictor,
    in_order_of_domains,
    predictor_of,
)

logger = logging.getLogger(__name__)

FOLDS = 5
"""Parts of the texts that are held out in turn, to measure the accuracy."""
# scikit-learn's C, the weight of each text's loss against the penalty, times the number of texts:
# so a text counts less among many. On MedQuAD .003 to .03 were best for 8,000 texts, .03 for 4,000.
_LOSS_WEIGHT = 100.0


class DomainPrediction(NamedTuple):
    """What :meth:`PredictsDomains.predict_domain` returns.

    Attributes:
        domains: the most probable domain of each text, a list of N names; one name for one text.
        probabilities: [N, C] float32, a column for each of the model's domains, in their order;
            [C] for one text.
    """

    domains: Any
    probabilities: NDArray[np.float32]


class PredictsDomains:
    """The methods of a SentenceTransformer whose mixture can predict the domain of a text.

    The predictor is a :class:`moe_fast.models.DomainPredictor` in the encoder, saved and loaded
    with its weights; also the stock ``SentenceTransformer`` then takes ``domain="auto"``.
    """

    def fit_domain_predictor(
        self,
        texts: Sequence[str],
        domains: Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
    ) -> Any:
        """Fit the predictor of domains that ``encode(texts, domain="auto")`` uses.

        scikit-learn fits a logistic regression to the mean word embedding of each text. Its
        coefficients are then multiplied by the word embeddings, so that what is saved are scores of
        tokens, which later training does not change. The frequencies of the domains in ``texts``
        count: a domain that is rare here is rarely predicted. The accuracy on texts that are held
        out in turn (five-fold cross-validation) is logged, and kept in
        ``config.domain_predictor["accuracy"]``; texts of one document in several folds make it
        higher than that of new documents.

        Args:
            texts, domains: N texts and the domain of each, at least five of every domain; best both
                queries and documents.
            prompt, prompt_name: what ``encode`` will put in front of the texts.
            truncate: as in ``encode``.

        Returns:
            The model itself, which now has the predictor; an earlier one is replaced.

        Raises:
            ValueError: for a model without domains, unknown domains, another number of domains than
                texts, fewer than five texts of a domain, and texts that are too long.
            TypeError: for texts that are no strings.
            ImportError: scikit-learn is not installed.
        """
        model: Any = self
        encoder = model.transformers_model
        texts, names = list(texts), _checked_names(encoder.config, texts, domains)
        tokens, starts = _flat(_tokenized(model, texts, prompt, prompt_name, truncate))
        vocabulary = encoder.get_input_embeddings().weight.detach()
        size = len(vocabulary) - len(encoder.config.domain_token_ids)
        words = vocabulary[:size].to("cpu", torch.float64)
        features = torch.nn.functional.embedding_bag(tokens, words, starts, mode="mean")
        known = list(encoder.config.domains)
        weights, bias, accuracy = _fit(features.numpy(), [known.index(name) for name in names])
        predictor = DomainPredictor(size, len(known))
        predictor.weight.copy_(words @ torch.from_numpy(weights))
        predictor.bias.copy_(torch.from_numpy(bias))
        encoder.base_model.add_module(NAME, predictor.to(vocabulary.device))
        encoder.config.domain_predictor = {
            "domains": known,
            "vocab_size": size,
            "num_texts": len(texts),
            "accuracy": round(accuracy, 4),
        }
        logger.info(
            "domain predictor: accuracy %.3f in %d-fold cross-validation on %d texts.",
            accuracy,
            FOLDS,
            len(texts),
        )
        return self

    def predict_domain(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
    ) -> DomainPrediction:
        """The domains of texts, as ``encode(texts, domain="auto")`` chooses them.

        Args:
            texts: one text or N.
            prompt, prompt_name, truncate: as in ``encode``.

        Raises:
            ValueError: the model has no predictor, or domains have been added since it was fitted;
                texts are too long.
            TypeError: for texts that are no strings.
        """
        model: Any = self
        predictor_of(model.transformers_model)
        if isinstance(texts, str):
            found = self.predict_domain(
                [texts], prompt=prompt, prompt_name=prompt_name, truncate=truncate
            )
            return DomainPrediction(found.domains[0], found.probabilities[0])
        logits = _logits(model, _tokenized(model, list(texts), prompt, prompt_name, truncate))
        config = model.transformers_model.config
        probabilities = logits.softmax(1).float().cpu().numpy()
        return DomainPrediction(_names(config, logits), probabilities)


def with_predictions(
    model: Any, texts: list[Any], domain: str | list[str], options: Mapping[str, Any]
) -> str | list[str]:
    """``domain``, one name or one per text, with predictions in the place of "auto".

    Args:
        model: a pipeline on a mixture.
        texts: N texts, as strings or tokenized.
        domain: as :func:`moe_fast.encoding.domains.checked_domain` returns it.
        options: those of ``encode``, of which the prompt counts.

    Raises:
        TypeError: for inputs that are no texts.
        ValueError: as :func:`moe_fast.models.domain_predictor.predictor_of`.
    """
    names = [domain] * len(texts) if isinstance(domain, str) else list(domain)
    places = [i for i, name in enumerate(names) if name == AUTO]
    wanted = [texts[i] for i in places]
    if not wanted:
        return names
    if not isinstance(wanted[0], TokenizedText):
        chosen = options.get("prompt"), options.get("prompt_name")
        wanted = _tokenized(model, wanted, *chosen, truncate=True, quiet=True)
    logits = _logits(model, wanted)
    for place, name in zip(places, _names(model.transformers_model.config, logits), strict=True):
        names[place] = name
    return names


def _logits(model: Any, texts: list[TokenizedText]) -> Tensor:
    """[N, C], the columns in the order of the model's domains."""
    encoder = model.transformers_model
    predictor = predictor_of(encoder)
    if not texts:
        return predictor.bias.new_empty(0, len(encoder.config.domains))
    tokens, starts = (x.to(predictor.bias.device) for x in _flat(texts))
    with torch.inference_mode():
        return in_order_of_domains(encoder.config, predictor(tokens, starts))


def _names(config: Any, logits: Tensor) -> list[str]:
    return [config.domains[i] for i in logits.argmax(1).tolist()]


def _flat(texts: Sequence[TokenizedText]) -> tuple[Tensor, Tensor]:
    """(all tokens [T], where each text starts in them [N]), both int64."""
    counts = torch.tensor([len(text.ids) for text in texts])
    tokens = np.concatenate([text.ids for text in texts]).astype(np.int64)
    return torch.from_numpy(tokens), counts.cumsum(0) - counts


def _tokenized(
    model: Any,
    texts: list[Any],
    prompt: str | None,
    prompt_name: str | None,
    truncate: bool | None,
    quiet: bool = False,
) -> list[TokenizedText]:
    if not all(isinstance(text, str) for text in texts):
        kind = next(type(text).__name__ for text in texts if not isinstance(text, str))
        raise TypeError(f"a domain is predicted from texts (str); got {kind}.")
    before = prompt_of(model, prompt, prompt_name)
    tokenized, long = tokenize_texts(model.tokenizer, texts, before, model.max_seq_length)
    if not quiet:
        long.settle(getattr(model, "truncate", True) if truncate is None else truncate)
    return tokenized


def _checked_names(config: Any, texts: list[str], domains: Any) -> list[str]:
    """The domain of each text.

    Raises:
        ValueError, TypeError: as :meth:`PredictsDomains.fit_domain_predictor`.
    """
    if not config.domains:
        raise ValueError(
            "fit_domain_predictor needs a model with domains, which encode then chooses from; this "
            "one has none. Name them when it is made: moe_fast.upcycle(..., domains=[...])."
        )
    if isinstance(domains, str):
        raise TypeError(f"domains must be a sequence of names, one per text; got {domains!r}.")
    names: Any = checked_domain(config, list(domains), len(texts))
    counts = Counter(names)
    if few := {name: counts[name] for name in config.domains if counts[name] < FOLDS}:
        said = ", ".join(f"{name} ({count})" for name, count in few.items())
        raise ValueError(
            f"texts must hold at least {FOLDS} texts of each of the model's domains; there are too "
            f"few of {said}."
        )
    return names


def _fit(
    features: NDArray[np.float64], labels: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Fit a logistic regression.

    Args:
        features: [N, D].
        labels: N numbers in [0, C).

    Returns:
        (weights [D, C], biases [C], accuracy in cross-validation). One domain has weights 0.
    """
    if max(labels) == 0:
        return np.zeros((features.shape[1], 1)), np.zeros(1), 1.0
    require("sklearn", "eval", "fit_domain_predictor")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=_LOSS_WEIGHT / len(labels), max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), classifier)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    accuracy = float(cross_val_score(pipeline, features, labels, cv=folds).mean())
    scaler = pipeline.fit(features, labels)[0]
    weights, bias = classifier.coef_.T / scaler.scale_[:, None], classifier.intercept_
    if weights.shape[1] == 1:  # two domains: scikit-learn gives the logit of the second alone
        weights, bias = np.hstack((0 * weights, weights)), np.append(0.0, bias)
    return weights, bias - scaler.mean_ @ weights, accuracy
