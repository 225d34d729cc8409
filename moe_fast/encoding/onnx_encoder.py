"""OnnxEncoder: embeds texts by a model that was exported to ONNX, in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.domains import asks_for_prediction, checked_domain
from moe_fast.encoding.lengths import TokenizedText, tokenize_texts
from moe_fast.encoding.prompts import prompt_of
from moe_fast.extras import require
from moe_fast.messages import shown
from moe_fast.models.configuration import AUTO, MoEConfigFields
from moe_fast.models.json_files import read_object
from moe_fast.ops.checks import check_choice, check_count

logger = logging.getLogger(__name__)

MODEL, SETTINGS = "model.onnx", "onnx_encoder.json"
OUTPUT, DOMAIN_IDS = "sentence_embedding", "domain_ids"
NO_DOMAIN = -1
"""In place of a domain's id: the text has none."""
_FORMAT = 1


@dataclass(frozen=True)
class OnnxSettings:
    """What an exported model's graph does not say.

    Attributes:
        inputs: the names of the graph's inputs, in their order: the tokenizer's arrays [B, L], and
            ``domain_ids`` [B] where each text may have a domain.
        dimension: the number of elements of a vector.
        max_seq_length: the most tokens of a text, or ``None``.
        prompts, default_prompt_name, truncate_dim: as of the ``SentenceTransformer``.
        routing, domains, default_domain: as in the mixture's configuration; "dense", none and
            ``None`` for a dense model.
        predicts_domain: whether the id ``len(domains)`` asks for the domain that is predicted.
        format: of this file.
        made_by: what wrote it.
    """

    inputs: list[str]
    dimension: int
    max_seq_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    routing: str = "dense"
    domains: list[str] = field(default_factory=list)
    default_domain: str | None = None
    predicts_domain: bool = False
    format: int = _FORMAT
    made_by: str = ""

    domain_id: ClassVar[Any] = MoEConfigFields.domain_id

    def write(self, folder: Path) -> None:
        """Write the file into a model's folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> OnnxSettings:
        """Read the file of a model's folder.

        Raises:
            ValueError: it is damaged, or of a later format.
        """
        content = read_object(folder / SETTINGS)
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"{folder / SETTINGS} must have format {_FORMAT}, the one that this moe_fast "
                f"reads; got {content.get('format')!r}, made by {content.get('made_by')!r}."
            )
        known = {entry.name for entry in dataclasses.fields(cls)}
        if content.keys() != known:
            wrong = ", ".join(sorted(content.keys() ^ known))
            raise ValueError(f"{folder / SETTINGS} is damaged: missing or unknown are {wrong}.")
        return cls(**content)


class OnnxEncoder:
    """A model in a folder that :func:`moe_fast.export_onnx` wrote, with ``encode``.

    It needs neither the weights in PyTorch nor sentence-transformers. Any number of threads may
    call ``encode``.

    Args:
        folder: the model's.
        truncate: the default of ``encode``'s argument: whether texts that are too long are cut.
        threads: of ONNX Runtime; ``None``: one per core.
        providers: of ONNX Runtime, in the order of preference; ``None``: the CPU's.

    Attributes:
        settings: what the export wrote about the model.
        tokenizer: the model's.
        session: the ``onnxruntime.InferenceSession``.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError, ValueError: the folder holds no such model, or a file is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        truncate: bool = False,
        threads: int | None = None,
        providers: Sequence[Any] | None = None,
    ) -> None:
        onnxruntime = require("onnxruntime", "onnx", "OnnxEncoder")
        path = Path(folder)
        missing = [name for name in (MODEL, SETTINGS) if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"folder must hold a model that moe_fast.export_onnx wrote; {path} has no "
                f"{' and no '.join(missing)}."
            )
        self.settings = OnnxSettings.read(path)
        self.truncate = truncate
        self.tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            check_count("threads", threads)
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(path / MODEL), options, providers=list(providers or ["CPUExecutionProvider"])
        )
        inputs = [entry.name for entry in self.session.get_inputs()]
        if inputs != self.settings.inputs:
            raise ValueError(
                f"{path / MODEL} must have the inputs that {SETTINGS} lists, "
                f"{self.settings.inputs}; got {inputs}."
            )

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts by name."""
        return self.settings.prompts

    @property
    def default_prompt_name(self) -> str | None:
        """The name of the prompt that is put before texts unless the call says otherwise."""
        return self.settings.default_prompt_name

    @property
    def max_seq_length(self) -> int | None:
        """The most tokens of a text."""
        return self.settings.max_seq_length

    def get_embedding_dimension(self) -> int:
        """The number of elements of a vector."""
        return self.settings.truncate_dim or self.settings.dimension

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        *,
        domain: str | Sequence[str] | None = None,
        truncate: bool | None = None,
    ) -> Any:
        """As ``SentenceTransformer.encode``; ``domain`` and ``truncate`` as in ours.

        Args:
            inputs: a text or a sequence of texts.
            prompt_name, prompt: of the model's prompts, or the prompt itself.
            batch_size: texts per call of ONNX Runtime.
            show_progress_bar: ``None``: if this module's log shows notes.
            output_value: "sentence_embedding".
            precision: "float32", or what sentence-transformers rounds to: "int8", "uint8", "binary"
                or "ubinary".
            convert_to_numpy, convert_to_tensor: return an array or a tensor; neither: a list of
                tensors.
            device, pool, chunk_size: ``None``: sessions have providers in place of devices, and
                threads in place of pools.
            normalize_embeddings: scale vectors to length 1.
            truncate_dim: cut vectors to so many elements; ``None``: as the model says.
            domain: as in :meth:`moe_fast.MoESentenceTransformer.encode`. A model with one domain
                folded in has none.
            truncate: cut texts that are too long; ``None``: the attribute ``truncate`` decides.

        Returns:
            As ``SentenceTransformer.encode``, in the order of ``inputs``.

        Raises:
            ValueError, TypeError: for arguments that do not fit; the message names them.
        """
        check_choice("output_value", output_value, ("sentence_embedding",))
        check_choice("precision", precision, ("float32", "int8", "uint8", "binary", "ubinary"))
        check_count("batch_size", batch_size)
        given = (("device", device), ("pool", pool), ("chunk_size", chunk_size))
        for name, value in given:
            if value is not None:
                raise ValueError(
                    f"{name} must be None: OnnxEncoder takes providers and threads when it is "
                    f"made; got {value!r}."
                )
        singular = isinstance(inputs, str)
        texts: list[str] = [inputs] if isinstance(inputs, str) else list(inputs)
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"inputs must be texts (str); got {type(wrong).__name__}.")
        size = self._size(truncate_dim)
        ids = self._domain_ids(domain, len(texts))
        tokenized = self._tokenized(texts, prompt, prompt_name, truncate)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        vectors = self._vectors(tokenized, ids, batch_size, show_progress_bar)[:, :size]
        if normalize_embeddings:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if precision != "float32" and len(vectors):
            util = require("sentence_transformers.util", "train", f"precision={precision!r}")
            vectors = util.quantize_embeddings(vectors, precision=precision)
        result: Any = vectors
        if convert_to_tensor:
            result = torch.from_numpy(np.ascontiguousarray(vectors))
        elif not convert_to_numpy:
            result = list(torch.from_numpy(np.ascontiguousarray(vectors)))
        return result[0] if singular else result

    def encode_query(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """As :meth:`encode`, with the prompt "query" if the model has it and none is named."""
        return self._encode_role(inputs, ("query",), options)

    def encode_document(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """As :meth:`encode`, with the prompt "document", "passage" or "corpus" if there is one."""
        return self._encode_role(inputs, ("document", "passage", "corpus"), options)

    def _encode_role(
        self, inputs: str | Sequence[str], names: tuple[str, ...], options: dict[str, Any]
    ) -> Any:
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = next((name for name in names if name in self.prompts), None)
        return self.encode(inputs, **options)

    def _size(self, truncate_dim: int | None) -> int:
        size = self.get_embedding_dimension() if truncate_dim is None else truncate_dim
        if truncate_dim is not None:
            check_count("truncate_dim", truncate_dim)
        return size

    def _domain_ids(self, domain: Any, num_texts: int) -> NDArray[np.int64] | None:
        """What the graph takes for the domains of the texts; ``None``: it takes nothing."""
        settings = self.settings
        names = checked_domain(settings, domain, num_texts, auto=True)
        if asks_for_prediction(names) and not settings.predicts_domain:
            raise ValueError(
                "domain must be a name, not 'auto': the exported model has no domain predictor "
                "that knows all domains."
            )
        if DOMAIN_IDS not in settings.inputs:
            return None
        if not isinstance(names, list):
            names = [names or settings.default_domain] * num_texts  # type: ignore[list-item]
        numbers = {name: i for i, name in enumerate(settings.domains)}
        numbers |= {AUTO: len(settings.domains), None: NO_DOMAIN}  # type: ignore[dict-item]
        return np.array([numbers[name] for name in names], np.int64)

    def _tokenized(
        self,
        texts: list[str],
        prompt: str | None,
        prompt_name: str | None,
        truncate: bool | None,
    ) -> list[TokenizedText]:
        if prompt is None and prompt_name is not None and prompt_name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "it has none"
            raise ValueError(
                f"prompt_name must be one of the model's ({known}); got {shown(prompt_name)}."
            )
        before = prompt_of(self, prompt, prompt_name)
        tokenized, long = tokenize_texts(self.tokenizer, texts, before, self.max_seq_length)
        long.settle(self.truncate if truncate is None else truncate)
        return tokenized

    def _vectors(
        self,
        texts: list[TokenizedText],
        domain_ids: NDArray[np.int64] | None,
        batch_size: int,
        show_progress_bar: bool,
    ) -> NDArray[np.float32]:
        """Embed texts, [N, d], in batches of texts of like lengths."""
        from tqdm.auto import trange

        vectors = np.empty((len(texts), self.settings.dimension), np.float32)
        order = np.argsort([-len(text.ids) for text in texts], kind="stable")
        starts = trange(0, len(texts), batch_size, desc="Batches", disable=not show_progress_bar)
        for start in starts:
            places = order[start : start + batch_size]
            batch = padded_batch([texts[i] for i in places], self.tokenizer)
            arrays = {name: tensor.numpy() for name, tensor in batch.items()}
            if domain_ids is not None:
                arrays[DOMAIN_IDS] = domain_ids[places]
            (vectors[places],) = self.session.run([OUTPUT], arrays)
        return vectors
