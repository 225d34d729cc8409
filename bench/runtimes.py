"""A dense SentenceTransformer in ONNX Runtime and OpenVINO, made by their own tools.

``torch.onnx.export``, ``onnxruntime.quantization``, ``openvino.convert_model`` and
``nncf.quantize`` make the models, as their documentation recommends for encoders. The files are
kept, for making them takes minutes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = dict[str, NDArray[np.int64]]
"""A padded batch: the tokenizer's arrays [texts, tokens] by name."""
Embed = Callable[[Iterable[Batch]], list[NDArray[np.float32]]]
"""Embeds batches; returns [texts, D] for each, in their order."""
PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf")
OUTPUT = "sentence_embedding"


def versions() -> dict[str, str | None]:
    """Return the versions of the runtimes' packages; None for those that are not installed."""
    return {name: metadata.version(name) if find_spec(name) else None for name in PACKAGES}


class Network(nn.Module):
    """A SentenceTransformer as a function of the tokenizer's arrays."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arrays: Tensor) -> Tensor:
        """Embed a padded batch: arrays [texts, tokens] in the tokenizer's order to [texts, D]."""
        features = dict(zip(self.model.tokenizer.model_input_names, arrays, strict=True))
        embedding: Tensor = self.model(features)[OUTPUT]
        return embedding


class Exports:
    """The files of one dense model in other formats.

    Args:
        model: a ``SentenceTransformer`` in float32, on the CPU; its ``max_seq_length`` cuts texts.
        calibration: texts from which static quantization takes the ranges of activations. They
            should be like the texts to embed, and not the same.
        folder: where files are kept, in a subfolder of this model, calibration and versions.
    """

    def __init__(self, model: Any, calibration: Sequence[str], folder: Path) -> None:
        self.model, self.calibration = model.eval(), list(calibration)
        state = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            state.update(name.encode() + tensor.contiguous().numpy().tobytes())
        used = [*versions().values(), metadata.version("torch")]
        state.update(repr([self.calibration, model.max_seq_length, used]).encode())
        self.folder = folder / state.hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """The names of the tokenizer's arrays, in the order of the network's arguments."""
        return list(self.model.tokenizer.model_input_names)

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """Tokenize, cut and pad to the longest, as the model's own ``preprocess``."""
        tokens = self.model.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.max_seq_length,
            return_tensors="np",
        )
        return {name: tokens[name] for name in self.names}

    def samples(self) -> Iterator[Batch]:
        """The calibration texts one by one: padding would widen the ranges."""
        return (self.tokenize([text]) for text in self.calibration)

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the file ``name``, which ``make`` writes if it is not there yet.

        It has a folder of its own, for OpenVINO writes a second file beside it.
        """
        target = self.folder / name
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                with _without_chatter():
                    make(temporary / name)
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return target / name

    def traced(self) -> tuple[Network, tuple[Tensor, ...]]:
        """Return the network, and a batch of texts of different lengths to trace it with."""
        batch = self.tokenize(["a text", "a text that has some more words"])
        return Network(self.model).eval(), tuple(map(torch.from_numpy, batch.values()))


@dataclass(frozen=True)
class Form:
    """A runtime at one precision.

    Attributes:
        who: the candidate's name in tables.
        needs: the packages that must be installed.
        load: makes the files, and returns the function that embeds, on so many threads that share
            so many batches at a time.
    """

    who: str
    needs: tuple[str, ...]
    load: Callable[[Exports, int, int], Embed]

    def missing(self) -> str | None:
        """Return why this form cannot run here; None if it can."""
        absent = [package for package in self.needs if find_spec(package) is None]
        return f"{', '.join(absent)} not installed (extra bench-peers)" if absent else None


# --- ONNX Runtime --------------------------------------------------------------------------------


def onnx_float32(exports: Exports, threads: int, streams: int) -> Embed:
    """The exported graph, whose LayerNorm and GELU ONNX Runtime fuses when it loads it."""
    return onnx_session(graph(exports), threads, streams)


def onnx_dynamic(exports: Exports, threads: int, streams: int) -> Embed:
    """Weights in int8 per channel; the ranges of activations are found in each call."""

    def make(path: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            graph(exports),
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )

    return onnx_session(exports.file("dynamic.onnx", make), threads, streams)


def onnx_static(exports: Exports, threads: int, streams: int) -> Embed:
    """Weights in int8 per channel; the ranges of activations come from the calibration texts."""

    def make(path: Path) -> None:
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            samples = exports.samples()

            def get_next(self) -> Batch | None:
                return next(self.samples, None)

        quantization.quantize_static(
            graph(exports),
            path,
            Reader(),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )

    return onnx_session(exports.file("static.onnx", make), threads, streams)


def graph(exports: Exports) -> Path:
    """Export the graph by tracing, with attention written out.

    Of four exports ONNX Runtime embeds fastest with this one: its own fusions of attention and of
    residual LayerNorm gain nothing, and the graphs of ``dynamo=True`` take 1.1 times as long with
    attention written out, 1.6 times with ``sdpa`` (MiniLM, Intel Xeon with AMX, two cores).
    """

    def make(path: Path) -> None:
        network, arrays = exports.traced()
        encoder = exports.model.transformers_model
        attention = encoder.config._attn_implementation
        encoder.set_attn_implementation("eager")
        sizes = {name: {0: "texts", 1: "tokens"} for name in exports.names}
        try:
            torch.onnx.export(
                network,
                arrays,
                path,
                dynamo=False,
                opset_version=17,
                input_names=exports.names,
                output_names=[OUTPUT],
                dynamic_axes=sizes | {OUTPUT: {0: "texts"}},
            )
        finally:
            encoder.set_attn_implementation(attention)

    return exports.file("float32.onnx", make)


def onnx_session(path: Path, threads: int, streams: int) -> Embed:
    """Load a graph that computes ``streams`` batches at a time, sharing the threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, threads // streams)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(batches: Iterable[Batch]) -> list[NDArray[np.float32]]:
        if streams == 1:
            return [session.run([OUTPUT], batch)[0] for batch in batches]
        with ThreadPoolExecutor(streams) as pool:
            return list(pool.map(lambda batch: session.run([OUTPUT], batch)[0], batches))

    return embed


# --- OpenVINO ------------------------------------------------------------------------------------


def openvino_float32(exports: Exports, threads: int, streams: int) -> Embed:
    """The converted model; without the hint OpenVINO computes in bfloat16 where that is fast."""
    return openvino_session(converted(exports), threads, streams, "f32")


def openvino_bfloat16(exports: Exports, threads: int, streams: int) -> Embed:
    """The same model; the runtime computes in bfloat16."""
    return openvino_session(converted(exports), threads, streams, "bf16")


def openvino_int8(exports: Exports, threads: int, streams: int) -> Embed:
    """Quantized by nncf for transformers, which includes SmoothQuant, from calibration texts.

    What is not in int8 is computed in the precision that OpenVINO chooses for this processor.
    """

    def make(path: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(converted(exports))
        samples = list(exports.samples())
        quantized = nncf.quantize(
            model,
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
        )
        openvino.save_model(quantized, path, compress_to_fp16=False)

    return openvino_session(exports.file("int8.xml", make), threads, streams)


def converted(exports: Exports) -> Path:
    """Convert the PyTorch model; the graph of ONNX would hide attention from OpenVINO."""

    def make(path: Path) -> None:
        import openvino

        network, arrays = exports.traced()
        with torch.no_grad():
            model = openvino.convert_model(network, example_input=arrays)
        for port, name in zip(model.inputs, exports.names, strict=True):
            port.get_tensor().set_names({name})
        openvino.save_model(model, path, compress_to_fp16=False)

    return exports.file("float32.xml", make)


def openvino_session(path: Path, threads: int, streams: int, precision: str | None = None) -> Embed:
    """Compile a model that computes ``streams`` batches at a time, sharing the threads."""
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def embed(batches: Iterable[Batch]) -> list[NDArray[np.float32]]:
        found: dict[int, NDArray[np.float32]] = {}
        queue = openvino.AsyncInferQueue(compiled)

        def keep(request: Any, number: int) -> None:
            found[number] = request.get_output_tensor().data.copy()

        queue.set_callback(keep)
        for number, batch in enumerate(batches):
            queue.start_async(batch, number)
        queue.wait_all()
        return [found[number] for number in sorted(found)]

    return embed


FORMS = {
    "float32": (
        Form("ONNX Runtime", ("onnx", "onnxruntime"), onnx_float32),
        Form("OpenVINO", ("openvino",), openvino_float32),
    ),
    "bfloat16": (Form("OpenVINO", ("openvino",), openvino_bfloat16),),
    "int8": (
        Form("ONNX Runtime, dynamic", ("onnx", "onnxruntime"), onnx_dynamic),
        Form("ONNX Runtime, static", ("onnx", "onnxruntime"), onnx_static),
        Form("OpenVINO, nncf", ("openvino", "nncf"), openvino_int8),
    ),
}
"""The forms by precision. ONNX Runtime has no bfloat16 on x86 processors."""


def encoder(exports: Exports, embed: Embed, batch_size: int) -> Callable[[Sequence[str]], Tensor]:
    """Return a function of texts to vectors [texts, D] in their order.

    As ``SentenceTransformer.encode``, it sorts texts by their length and tokenizes batch by batch.
    """

    def encode(texts: Sequence[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        found = embed(exports.tokenize([texts[i] for i in part]) for part in parts)
        vectors = torch.from_numpy(np.concatenate(found))
        return torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors)

    return encode


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Silence warnings and progress bars of exporters, and telemetry's note; errors are raised."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
