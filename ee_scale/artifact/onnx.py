"""A stock Hugging Face folder as an ONNX file, checked against torch, with weights in fp32 or int8.

The one file that touches the onnx packages; importing it raises `UserError` without them.
"""

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from ee_scale.artifact.hf_folder import write_beside
from ee_scale.artifact.onnx_shapes import declare_shapes
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.errors import UserError, one_line
from ee_scale.families.build import AUTO_CLASS, meta_model
from ee_scale.families.registry import find_family
from ee_scale.families.sizes import max_length
from ee_scale.files import new_folder
from ee_scale.modeling.versions import CACHE


@contextmanager
def quiet() -> Iterator[None]:
    """Exporter and quantizer print, warn, log, and set up Python's logging as if the process were theirs."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    try:
        logging.disable(logging.ERROR)  # what matters raises
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


try:
    with quiet():
        import onnx
        import onnx_ir
        import onnxruntime
        from onnx import helper, numpy_helper
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from transformers.exporters import OnnxConfig, OnnxExporter
except ImportError as error:
    raise UserError(f"format=onnx: needs more packages: pip install 'ee-scale[edge]' ({error})") from error

FILE = "model.onnx"
TOLERANCE = 1e-3  # of the largest logit, for fp32
BLOCK = 32  # weights that share a scale
EXPORTED, CHECKED = (2, 7), ((1, 5), (3, 12))  # batch and tokens; other shapes are checked than the exported one
PAST = 4  # tokens in the cache of the exported example
TIMED_TOKENS, ROUNDS = 64, 7


@dataclass(frozen=True)
class OnnxReport:
    """How the file compares with torch's fp32 model.

    Attributes:
        files: bytes by name, model and its weights.
        largest_difference: between logits, of random tokens in two shapes; `logit_scale` is the largest logit of torch.
        agreement: share of positions (texts, for a classifier) whose largest logit is the same one.
        torch_ms, onnx_ms: median of a forward of `tokens` tokens, batch 1, on the CPU with torch's threads.
    """

    files: dict[str, int]
    largest_difference: float
    logit_scale: float
    agreement: float
    torch_ms: float
    onnx_ms: float
    tokens: int


def export_onnx(folder: Path, out: Path, task: str, *, int8: bool = False) -> OnnxReport:
    """Write `out`/model.onnx (weights in model.onnx.data) with config and tokenizer, for 'causal_lm' or 'classify'.

    Inputs: input_ids [B, S], attention_mask [B, P + S]; a decoder's also past_key_values.<layer>.key and .value
    [B, heads, P, D], with P = 0 for a prompt, and outputs present.<layer>.key and .value [B, heads, P + S, D]. Output:
    logits [B, S, V], or [B, labels]. Every B, S and P will do; the file calls them batch_size, sequence_length and
    past_sequence_length.

    int8: weights of matrix products in blocks of BLOCK with one scale each, embedding tables with one scale per row;
    the runtime may round the inputs of products to int8 as well. Biases and norms stay in fp32.
    Raises `UserError` if the packages fail on the model or the fp32 file says anything but what torch says.
    """
    try:
        config = ModelFolder(folder).config
    except UserError as error:
        raise UserError(str(error).replace("model.path=", "src=", 1)) from error
    if find_family(config):  # transformers fills what is missing at random
        ModelTensors(folder, meta_model(config, torch.float32, task=task))
    try:
        model = AUTO_CLASS[task].from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"src={folder}: {one_line(error)}") from error
    with new_folder(out) as temporary:
        path = temporary / FILE
        with quiet():
            program = _converted(model, task, own_head=int8)
        onnx_ir.save(program, str(path), external_data=f"{FILE}.data")
        report = _compare(path, model, task)
        if not report.largest_difference <= TOLERANCE * report.logit_scale:  # not a number fails too
            raise UserError(
                f"src={folder}: the ONNX file is off by {report.largest_difference:.3g} on logits up to "
                f"{report.logit_scale:.3g} (more than {TOLERANCE:g} of them); nothing was written"
            )
        if int8:
            with quiet():
                _quantize(path)
            report = _compare(path, model, task)
        write_beside(temporary, folder, dtype="float32", torch_dtype="float32")
    return report


def _converted(model: PreTrainedModel, task: str, own_head: bool) -> Any:
    """transformers' own exporter -> an `onnx_ir.Model` with the names of `export_onnx`."""
    if own_head and model.get_output_embeddings() is not None:
        # A table that is read as a matrix too would stay in fp32: quantized they differ, so each gets its own.
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    inputs: dict[str, Any] = {"input_ids": torch.ones(EXPORTED, dtype=torch.long)}
    length = EXPORTED[1]
    if task == "causal_lm":
        # Without a config the cache keeps every position of every layer; sliding windows are the mask's business.
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.ones((EXPORTED[0], PAST), dtype=torch.long), use_cache=True, **{CACHE: cache})
        inputs |= {CACHE: cache, "use_cache": True}
        length += PAST
    inputs["attention_mask"] = torch.ones((EXPORTED[0], length), dtype=torch.long)
    try:
        exported: Any = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
        program = exported.program if hasattr(exported, "program") else exported.model  # older: torch's ONNXProgram
    except Exception as error:  # torch and onnxscript raise anything
        raise UserError(f"format=onnx: {type(model).__name__} cannot be exported ({one_line(error)})") from error
    _name_cache(program.graph)
    declare_shapes(program.graph)
    return program


def _name_cache(graph: onnx_ir.Graph) -> None:
    """input.past_key_values.layers.0.keys -> past_key_values.0.key, as other tools call it; outputs: present.0.key."""
    for values, name in ((graph.inputs, "past_key_values"), (graph.outputs, "present")):
        for value in values:
            parts = (value.name or "").split(".")
            if parts[-1] in ("keys", "values"):
                value.name = f"{name}.{parts[-2]}.{parts[-1].removesuffix('s')}"


# -- int8 --------------------------------------------------------------------------------------------------------------


def _quantize(path: Path) -> None:
    """Matrix products become MatMulNBits (onnxruntime), whose kernels may use int8 arithmetic (accuracy level 4)."""
    model = onnx.load(path)
    _quantize_tables(model.graph)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    for old in path.parent.glob(f"{FILE}*"):
        old.unlink()  # onnx appends to a file of weights that is there
    onnx.save(quantizer.model.model, path, save_as_external_data=True, location=f"{FILE}.data", size_threshold=1024)


def _quantize_tables(graph: onnx.GraphProto) -> None:
    """table[ids] -> table_int8[ids] x scale[ids], one scale per row: a row is 127 times its scale at its largest."""
    tables = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    readers = [node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    for name in dict.fromkeys(readers):
        table = numpy_helper.to_array(tables[name])
        if table.dtype != np.float32:
            continue
        scale = np.maximum(np.abs(table).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
        rows = np.round(table / scale).astype(np.int8)
        graph.initializer.extend(
            [numpy_helper.from_array(rows, f"{name}_int8"), numpy_helper.from_array(scale, f"{name}_scale")]
        )
        _dequantize_after(graph, name)
        if not any(name in node.input for node in graph.node):
            graph.initializer.remove(tables[name])


def _dequantize_after(graph: onnx.GraphProto, name: str) -> None:
    """Every read of rows of table `name` reads int8 rows and their scales."""
    nodes = []
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] != name:
            nodes.append(node)
            continue
        result, ids = node.output[0], node.input[1]
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", ids], [f"{result}_int8"]),
            helper.make_node("Gather", [f"{name}_scale", ids], [f"{result}_scale"]),
            helper.make_node("Cast", [f"{result}_int8"], [f"{result}_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{result}_float", f"{result}_scale"], [result]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


# -- check -------------------------------------------------------------------------------------------------------------


class OnnxModel:
    """The file in onnxruntime, on the CPU, called as the torch model is."""

    def __init__(self, path: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.past = {
            value.name: (int(value.shape[1]), int(value.shape[3]))
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def __call__(self, ids: np.ndarray, past: dict[str, np.ndarray] | None = None) -> tuple[np.ndarray, dict]:
        """[B, S] -> (logits, keys and values for the next call's `past`)."""
        if past is None:
            past = {name: np.zeros((len(ids), heads, 0, dim), np.float32) for name, (heads, dim) in self.past.items()}
        length = next(iter(past.values())).shape[2] if past else 0
        mask = np.ones((len(ids), length + ids.shape[1]), np.int64)
        names = [value.name for value in self.session.get_outputs()]
        values = self.session.run(names, {"input_ids": ids, "attention_mask": mask, **past})
        found = dict(zip(names, values, strict=True))
        return found["logits"], {name: found[name.replace("past_key_values", "present")] for name in past}


@torch.no_grad()
def _compare(path: Path, model: PreTrainedModel, task: str) -> OnnxReport:
    running, random = OnnxModel(path), torch.Generator().manual_seed(0)
    vocabulary, answers, references = model.config.vocab_size, [], []
    for shape in CHECKED:
        ids = torch.randint(vocabulary, shape, generator=random)
        references.append(model(ids).logits.flatten(0, -2).numpy())
        answers.append(_answer(running, ids.numpy(), task).reshape(references[-1].shape))
    ours, theirs = np.concatenate(answers), np.concatenate(references)
    tokens = min(TIMED_TOKENS, max_length(model.config))
    ids = torch.randint(vocabulary, (1, tokens), generator=random)
    torch_ms, onnx_ms = in_turns(lambda: model(ids), lambda: running(ids.numpy()))
    return OnnxReport(
        files={file.name: file.stat().st_size for file in sorted(path.parent.glob(f"{FILE}*"))},
        largest_difference=float(np.abs(ours - theirs).max()),
        logit_scale=float(np.abs(theirs).max()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        torch_ms=torch_ms,
        onnx_ms=onnx_ms,
        tokens=tokens,
    )


def _answer(running: OnnxModel, ids: np.ndarray, task: str) -> np.ndarray:
    """Logits of a text; a decoder reads it in three pieces, so that its cache is checked too."""
    if task != "causal_lm":
        return running(ids)[0]
    pieces, past = [], None
    for piece in (ids[:, :-3], ids[:, -3:-1], ids[:, -1:]):
        logits, past = running(piece, past)
        pieces.append(logits)
    return np.concatenate(pieces, 1)


def in_turns(*calls: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Median milliseconds of each call; in turns, so that other work on the machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
    return [median(spent[1:]) for spent in times]  # the first round is a warm-up
