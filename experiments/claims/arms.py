"""The arms: what is made of the pretrained model and trained, and how it then encodes texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

import moe_fast
from experiments.claims.data import Data, in_batches, of_domain
from experiments.claims.settings import Settings
from experiments.large_batch import sequential
from moe_fast.demo.comparison import fine_tune
from moe_fast.losses import InfoNCELoss, RouterLoss
from moe_fast.training.pooling import ExpertPoolingCallback

ALL = "all texts"


class Encode(Protocol):
    """Turns texts [N] and the domain of each into vectors [N, d]."""

    def __call__(self, texts: Sequence[str], domains: Sequence[str]) -> NDArray[np.float32]:
        """Encode; arms that do not know domains ignore them."""
        ...


@dataclass
class Trained:
    """An arm after training.

    Attributes:
        encode: see :class:`Encode`.
        knows_domains: whether the domains that it is given matter.
        steps: optimizer steps, of all models together.
        seconds: of the training.
        losses: by step.
    """

    encode: Encode
    knows_domains: bool
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """What every arm starts from."""

    model: Path
    data: Data
    settings: Settings

    def dense(self) -> SentenceTransformer:
        """The pretrained model."""
        dense = SentenceTransformer(str(self.model), device=self.settings.device)
        dense.max_seq_length = self.settings.tokens
        return dense

    def upcycled(self, **settings: Any) -> Any:
        """A mixture of it that, if its encoder can, computes nothing for padding in training."""
        model = moe_fast.upcycle(self.dense(), seed=self.settings.seed, **settings)
        encoder = model.transformers_model
        if encoder.architecture.not_packed is None:
            encoder.set_attn_implementation("moe_fast")
        return model

    def single(self) -> Any:
        """A mixture of one expert: the dense model, computed as all other arms are."""
        return self.upcycled(
            num_experts=1,
            routing="enforced",
            domains=[ALL],
            default_domain=ALL,
            domain_tokens=False,
        )

    def enforced(self, **settings: Any) -> Any:
        """One expert per domain."""
        domains = self.data.domains
        return self.upcycled(
            num_experts=len(domains), routing="enforced", domains=domains, **settings
        )

    def pairs(self) -> Dataset:
        """The training pairs, in the order of their batches."""
        return in_batches(self.data.train, self.settings.batch_size, self.settings.seed)

    def autocast(self) -> Any:
        """The precision of training and evaluation."""
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.settings.device, torch.bfloat16)

    def train(
        self, model: Any, pairs: Dataset, callbacks: Sequence[Any] = (), **router: float
    ) -> tuple[list[float], float]:
        """Train for one pass over the pairs; return the losses by step, and seconds."""
        settings = self.settings
        loss: Any = InfoNCELoss(model, temperature=settings.temperature, symmetric=True)
        if router:
            loss = RouterLoss(loss, num_domains=len(self.data.domains), **router)
        history, seconds = fine_tune(
            model,
            pairs,
            loss,
            settings,
            batch_sampler=sequential,
            callbacks=callbacks,
            bf16=settings.precision == "bfloat16",
        )
        return [entry["loss"] for entry in history], seconds

    def encoder(self, model: Any, *, knows_domains: bool) -> Encode:
        """How one model encodes."""

        def encode(texts: Sequence[str], domains: Sequence[str]) -> NDArray[np.float32]:
            options = {"domain": list(domains)} if knows_domains else {}
            with self.autocast():
                vectors = model.encode(
                    list(texts),
                    batch_size=64,
                    truncate=True,
                    normalize_embeddings=True,
                    convert_to_tensor=True,
                    **options,
                )
            return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()

        return encode


# --- the arms ------------------------------------------------------------------------------------


def pretrained(setup: Setup) -> Trained:
    """(a) The model as it is."""
    return Trained(setup.encoder(setup.single(), knows_domains=False), knows_domains=False)


def dense(setup: Setup) -> Trained:
    """(b) One dense model for all domains."""
    model = setup.single()
    pairs = _of_all(setup.pairs())
    losses, seconds = setup.train(model, pairs)
    encode = setup.encoder(model, knows_domains=False)
    return Trained(encode, False, len(losses), seconds, losses)


def prefixed(setup: Setup) -> Trained:
    """(c) One dense model; every text begins with the name of its domain."""
    model = setup.single()
    pairs = setup.pairs().map(
        lambda row: {name: with_prefix(row[name], row["domain"]) for name in ("a", "b")}
    )
    losses, seconds = setup.train(model, _of_all(pairs))
    plain = setup.encoder(model, knows_domains=False)

    def encode(texts: Sequence[str], domains: Sequence[str]) -> NDArray[np.float32]:
        return plain([with_prefix(t, d) for t, d in zip(texts, domains, strict=True)], domains)

    return Trained(encode, True, len(losses), seconds, losses)


def one_model_per_domain(setup: Setup) -> Trained:
    """(d) A dense model per domain, each trained on the pairs of its domain."""
    models, losses, seconds = _specialists(setup)
    encoders = {
        domain: setup.encoder(model, knows_domains=False) for domain, model in models.items()
    }

    def encode(texts: Sequence[str], domains: Sequence[str]) -> NDArray[np.float32]:
        found: NDArray[np.float32] | None = None
        for domain in sorted(set(domains)):
            places = of_domain(domains, domain)
            vectors = encoders[domain]([texts[i] for i in places], [domain] * len(places))
            if found is None:
                found = np.full((len(texts), vectors.shape[1]), np.nan, np.float32)
            found[places] = vectors
        assert found is not None
        return found

    return Trained(encode, True, len(losses), seconds, losses)


def joined(setup: Setup) -> Trained:
    """(f) The models of (d), joined to a mixture; what experts share is their mean."""
    models, losses, seconds = _specialists(setup)
    experts = [moe_fast.extract_expert(model, 0) for model in models.values()]
    mixture = moe_fast.from_experts(experts, domains=list(models), shared="mean")
    return Trained(setup.encoder(mixture, knows_domains=True), True, len(losses), seconds, losses)


def mixture(setup: Setup, **settings: Any) -> Trained:
    """(e), (h) One expert per domain, in all layers or in one; a text's domain chooses."""
    model = setup.enforced(**settings)
    losses, seconds = setup.train(model, setup.pairs())
    return Trained(setup.encoder(model, knows_domains=True), True, len(losses), seconds, losses)


def lora(setup: Setup) -> Trained:
    """(i) As (e), with experts that are low-rank pairs on one frozen MLP; only these are trained.

    Its domain tokens stay [CLS] for the same reason: all that domains differ in are the pairs.
    """
    settings = setup.settings
    faster = replace(setup, settings=replace(settings, learning_rate=settings.lora_learning_rate))
    form = {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    return mixture(faster, expert_form="lora", **form)


def pooled(setup: Setup, strength: float) -> Trained:
    """(p) As (e), and experts of small domains learn from the others' texts too."""
    model, pairs = setup.enforced(), setup.pairs()
    pooling = ExpertPoolingCallback(Counter(pairs["domain"]), strength)
    losses, seconds = setup.train(model, pairs, [pooling])
    return Trained(setup.encoder(model, knows_domains=True), True, len(losses), seconds, losses)


def dense_first(setup: Setup) -> Trained:
    """(q) The first half of the steps as a dense model, the second half as (e)."""
    model, pairs = setup.enforced(), setup.pairs()
    half = len(pairs) // setup.settings.batch_size // 2
    pooling = ExpertPoolingCallback(Counter(pairs["domain"]), math.inf, steps=half)
    losses, seconds = setup.train(model, pairs, [pooling])
    return Trained(setup.encoder(model, knows_domains=True), True, len(losses), seconds, losses)


def routed(
    setup: Setup, routing: str, num_experts_per_tok: int = 1, information: bool = False
) -> Trained:
    """(g), (j) A learned router, with the loss of balance or that of mutual information."""
    model = setup.upcycled(
        num_experts=len(setup.data.domains),
        num_experts_per_tok=num_experts_per_tok,
        routing=routing,
    )
    settings = setup.settings
    router = {"load_balance": settings.load_balance}
    if information:
        router = {"mutual_information": settings.mutual_information}
    losses, seconds = setup.train(model, setup.pairs(), **router)
    return Trained(setup.encoder(model, knows_domains=False), False, len(losses), seconds, losses)


ARMS: dict[str, tuple[str, Callable[[Setup], Trained]]] = {
    "a": ("pretrained", pretrained),
    "b": ("dense", dense),
    "c": ("dense, domain as prefix", prefixed),
    "d": ("a dense model per domain", one_model_per_domain),
    "e": ("mixture by domain", mixture),
    "e0": ("mixture by domain, no domain tokens", lambda s: mixture(s, domain_tokens=False)),
    "f": ("(d) joined to a mixture", joined),
    "g-token-balance": ("router of tokens, balance", lambda s: routed(s, "token_topk")),
    "g-token-information": (
        "router of tokens, mutual information",
        lambda s: routed(s, "token_topk", information=True),
    ),
    "g-sentence-balance": ("router of sentences, balance", lambda s: routed(s, "sentence_topk")),
    "g-sentence-information": (
        "router of sentences, mutual information",
        lambda s: routed(s, "sentence_topk", information=True),
    ),
    "h": ("mixture by domain, one layer", lambda s: mixture(s, layers="single")),
    "i": ("mixture by domain, LoRA experts", lora),
    "p-300": ("mixture by domain, pooled by 300 pairs", lambda s: pooled(s, 300)),
    "p-3000": ("mixture by domain, pooled by 3,000 pairs", lambda s: pooled(s, 3000)),
    "q": ("dense for half of the steps, then a mixture by domain", dense_first),
    "j": ("router of tokens, K = 2, balance", lambda s: routed(s, "token_topk", 2)),
}
"""{name: (title, what trains it)}."""


def with_prefix(text: str, domain: str) -> str:
    """A text that begins with the name of its domain."""
    return f"{domain.replace('_', ' ')}: {text}"


def _of_all(pairs: Dataset) -> Dataset:
    """The same pairs, all of one domain, for the mixture of one expert."""
    return pairs.map(lambda row: {"domain": ALL})


def _specialists(setup: Setup) -> tuple[dict[str, Any], list[float], float]:
    """A dense model for each domain, the losses of all of them by step, and seconds."""
    pairs, models = setup.pairs(), {}
    losses: list[float] = []
    seconds = 0.0
    for domain in setup.data.domains:
        own = pairs.select(of_domain(pairs["domain"], domain))
        models[domain] = setup.single()
        found, took = setup.train(models[domain], _of_all(own))
        losses, seconds = losses + found, seconds + took
    return models, losses, seconds
