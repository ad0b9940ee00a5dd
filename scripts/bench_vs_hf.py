#!/usr/bin/env python3
"""Decode and prefill speed beside Hugging Face transformers and llama.cpp, in one run.

The model is a bench geometry with random weights, the same on every side, each side holding them in its own format:

    deepseek-v3        hidden 1024, 8 layers of which 1 dense, 16 heads, 64 experts of 512, top-6, vocabulary 32000;
                       841 M parameters
    deepseek-v4-flash  hidden 1024, 7 layers with compression ratios 0, 0, 4, 128, 4, 128, 4, the rest alike; 846 M
                       parameters, experts in FP4
    deepseek-r1-distill-qwen-1.5b
                       the preset in full: 28 layers, 1777 M parameters, bfloat16

The columns:

    dsjax-stored      the checkpoint's FP8 and FP4 codes, resident as stored
    dsjax-int8        --weights int8; -fp8, -bfloat16 and -float32 likewise. Activations are bfloat16 in these five.
    dsjax-w8a8, -w4a8 products of integers; only when asked for
    dsjax-all-float32 float32 weights and activations, the counterpart of hf-float32; only when asked for
    hf-bfloat16       Hugging Face's model of the family; every ratio is to this column
    hf-float32        the same in float32; only with --hf-float32 or when asked for
    llama-q8          llama.cpp through llama_cpp, Q8_0 weights, V3 only; only with --gguf FILE, see make_bench_gguf.py
    llama-q8-extra    the same with weights repacked where llama.cpp can (see LlamaCpp); only when asked for

All columns are loaded at once. First the logits of one prompt are compared, to see that all sides run the same model.
Then they take turns within each round, in an order that shifts by one from round to round, so that what else the
machine does falls on all alike. One round warms up. A round's decode time is the median of its steps; the table's
numbers come from medians over rounds. Prefill is from the prompt to the first token; compiling is not counted. Needs
the `parity` extra.

    .venv/bin/python scripts/bench_vs_hf.py [--geometry deepseek-v4-flash] [--columns dsjax-stored,hf-bfloat16]
        [--cases decode-1] [--rounds 7]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsjax.checkpoint.load import load
from dsjax.checkpoint.names import official_name
from dsjax.config import Config, V3Config, V4Config, load_config
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.params import Tree, table, tree_bytes
from dsjax.synth import synth_config, synthesise
from quant import QArray

GEOMETRIES: dict[str, tuple[int, dict[str, Any]]] = {  # preset: (layers, settings)
    "deepseek-v3": (
        8,
        {
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "q_lora_rank": 384,
            "n_routed_experts": 64,
            "moe_intermediate_size": 512,
            "num_experts_per_tok": 6,
        },
    ),
    "deepseek-v4-flash": (
        7,
        {
            "num_nextn_predict_layers": 0,
            "vocab_size": 32000,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "q_lora_rank": 384,
            "o_lora_rank": 256,
            "o_groups": 4,
            "n_routed_experts": 64,
            "moe_intermediate_size": 512,
            "num_experts_per_tok": 6,
            "index_n_heads": 16,
            "index_topk": 512,
        },
    ),
    "deepseek-r1-distill-qwen-1.5b": (28, {}),
}
"""What `dsjax synth` makes of a preset for the comparison; all else is the preset's."""
UNQUANTISED = ("deepseek-r1-distill-qwen-1.5b",)

DSJAX = {  # column: (weights, dtype of activations)
    "dsjax-stored": ("stored", "bfloat16"),
    "dsjax-fp8": ("fp8", "bfloat16"),
    "dsjax-int8": ("int8", "bfloat16"),
    "dsjax-w8a8": ("w8a8", "bfloat16"),
    "dsjax-w4a8": ("w4a8", "bfloat16"),
    "dsjax-bfloat16": ("bfloat16", "bfloat16"),
    "dsjax-float32": ("float32", "bfloat16"),
    "dsjax-all-float32": ("float32", "float32"),
}
ASKED_FOR = ("dsjax-all-float32", "dsjax-w8a8", "dsjax-w4a8")
HUGGING_FACE = {"hf-bfloat16": "bfloat16", "hf-float32": "float32"}
LLAMA = {"llama-q8": False, "llama-q8-extra": True}  # column: whether extra buffers are used
BASELINE = "hf-bfloat16"
HEADINGS = {
    "dsjax-stored": "dsjax, as stored",
    "dsjax-fp8": "dsjax, fp8",
    "dsjax-int8": "dsjax, int8",
    "dsjax-w8a8": "dsjax, w8a8",
    "dsjax-w4a8": "dsjax, w4a8",
    "dsjax-bfloat16": "dsjax, bf16",
    "dsjax-float32": "dsjax, f32",
    "dsjax-all-float32": "dsjax, all f32",
    "hf-bfloat16": "Hugging Face, bf16",
    "hf-float32": "Hugging Face, f32",
    "llama-q8": "llama.cpp, Q8_0",
    "llama-q8-extra": "llama.cpp, Q8_0 repacked",
}
ENOUGH_ROUNDS = 5
AGREEMENT_TOKENS = 160
"""Of the prompt whose logits are compared: more than a window of 128, and enough for each of V4's compressors."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
      heading: what the row is called.
      batch, prompt_length: prompts at once, and tokens of each.
      decode: whether steps after the prompt are timed, or the prompt itself.
    """

    heading: str
    batch: int
    prompt_length: int
    decode: bool

    @property
    def tokens(self) -> int:
        """How many tokens the timed piece of work is for."""
        return self.batch if self.decode else self.batch * self.prompt_length


CASES = {
    "decode-1": Case("decode, batch 1, prompt 128", 1, 128, decode=True),
    "prefill-128": Case("prefill of 128", 1, 128, decode=False),
    "prefill-512": Case("prefill of 512", 1, 512, decode=False),
    "decode-8": Case("decode, batch 8, prompt 32 each", 8, 32, decode=True),
}


class Side(Protocol):
    """A model in one program and format: the bytes its weights take, and how long it needs."""

    weight_bytes: int

    def logits(self, prompt: np.ndarray) -> np.ndarray | None:
        """float32 [B, T, V] of an int prompt [B, T]; None from a side that gives none."""

    def run(self, prompt: np.ndarray, steps: int) -> tuple[float, list[float]]:
        """(seconds of prefill, seconds of each decode step), greedy; int prompt [B, T]."""


def checkpoint(folder: Path, geometry: str = "deepseek-v3") -> Path:
    """The folder; made, of a bench geometry, where there is none."""
    if not folder.exists():
        layers, settings = GEOMETRIES[geometry]
        synthesise(folder, synth_config(geometry, layers=layers, settings=settings), template=geometry)
    return folder


class Dsjax:
    """dsjax, plain numerics."""

    def __init__(self, config: Config, params: Tree, dtype: str) -> None:
        self.engine = Engine(config, params, Numerics("plain", dtype))
        self.weight_bytes = tree_bytes(params)

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        return self.engine.score(prompt)[0]

    def run(self, prompt: np.ndarray, steps: int) -> tuple[float, list[float]]:
        timing = self.engine.generate(prompt.tolist(), steps + 1)[1]
        return timing.ttft_s, timing.token_s


def _state(config: Config, params: Tree, names: Iterable[str]) -> dict[str, Any]:
    """Hugging Face's state dict, `names` of it: the checkpoint's tensors, but a layer's experts are one, gate above up.

    Names of what is computed, and in no checkpoint, are left out.
    """
    import torch

    def tensor(leaf: Any) -> torch.Tensor:
        if isinstance(leaf, QArray):
            return torch.from_dlpack(leaf.codes).view(torch.bfloat16)
        return torch.from_dlpack(leaf)

    tensors, experts = {}, {}
    for row in table(config):
        leaf: Any = params
        for key in row.path:
            leaf = leaf[key]
        values = tensor(leaf)
        if row.experts:
            experts.update({(str(layer), row.path[-1]): values[i] for i, layer in enumerate(row.layers)})
        else:
            tensors.update({name: values[index] for index, name in row.tensors()})
    state = {}
    for name in names:
        own = official_name(name) if isinstance(config, V4Config) else name
        if ".mlp.experts." in name:
            layer = name.split(".")[2]
            parts = ("down",) if name.endswith("down_proj") else ("gate", "up")
            state[name] = torch.cat([experts[layer, part] for part in parts], dim=1)
        elif own in tensors:
            state[name] = tensors[own]
    return state


class HuggingFace:
    """Hugging Face's model of the family with its own cache, as `from_pretrained` makes it.

    What that keeps in float32 whatever the dtype (V4's streams, norms and sinks) is float32.
    """

    def __init__(self, folder: Path, config: Config, params: Tree, dtype: str, experts: str | None) -> None:
        import torch
        import transformers

        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key in ("quantization_config", "torch_dtype", "architectures", "model_type", "expert_dtype"):
            c.pop(key, None)
        if isinstance(config, V3Config):
            c["num_key_value_heads"] = config.num_attention_heads
        family = {"deepseek_v4": "DeepseekV4", "qwen2": "Qwen2"}.get(config.model_type, "DeepseekV3")
        hf_config, kind = getattr(transformers, f"{family}Config")(**c), getattr(transformers, f"{family}ForCausalLM")
        with torch.device("meta"):
            names = list(kind(hf_config).state_dict())
        state = _state(config, params, names)
        choice = {"experts_implementation": experts} if experts else {}
        self.model = kind.from_pretrained(
            None, config=hf_config, state_dict=state, dtype=getattr(torch, dtype), **choice
        ).eval()
        self.experts = getattr(self.model.config, "_experts_implementation", None)
        self.weight_bytes = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(prompt), use_cache=False).logits.float().numpy()

    def run(self, prompt: np.ndarray, steps: int) -> tuple[float, list[float]]:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(torch.from_numpy(prompt), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            prefill = time.perf_counter() - start
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                seconds.append(time.perf_counter() - start)
        return prefill, seconds


class LlamaCpp:
    """llama.cpp through llama_cpp's low-level interface: its own defaults but for threads, sizes and extra buffers.

    Extra buffers hold repacked weights; on x86, Q8_0 has a repacked form for AMX only. docs/decisions.md says why they
    are off unless asked for.
    """

    CONTEXT = 1024
    BATCH = 512

    def __init__(self, file: Path, vocab_size: int, threads: int, extra_buffers: bool) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.vocab_size = vocab_size
        self.threads = threads
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = extra_buffers
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(file), params)
        if not self.model:
            raise SystemExit(f"{file}: expected a GGUF file that llama.cpp loads, found none")
        self.weight_bytes = llama_cpp.llama_model_size(self.model)
        self.contexts: dict[int, tuple[Any, Any]] = {}

    def _context(self, sequences: int) -> tuple[Any, Any]:
        """A context for that many sequences, its memory empty, and a batch to feed it with."""
        api = self.api
        if sequences not in self.contexts:
            params = api.llama_context_default_params()
            params.n_ctx = self.CONTEXT
            params.n_batch = params.n_ubatch = self.BATCH
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.threads
            context = api.llama_init_from_model(self.model, params)
            if not context:
                raise SystemExit(f"llama.cpp: expected a context of {self.CONTEXT} tokens, found no room for it")
            self.contexts[sequences] = (context, api.llama_batch_init(self.BATCH, 0, 1))
        context, batch = self.contexts[sequences]
        api.llama_memory_clear(api.llama_get_memory(context), True)
        return context, batch

    def _step(self, context: Any, batch: Any, tokens: np.ndarray, at: int) -> np.ndarray:
        """Greedy next tokens [B, 1] after int tokens [B, T] at positions from `at`, all in one batch."""
        rows, width = tokens.shape
        batch.n_tokens = rows * width
        for i, token in enumerate(tokens.reshape(-1).tolist()):
            batch.token[i] = token
            batch.pos[i] = at + i % width
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // width
            batch.logits[i] = i % width == width - 1
        if self.api.llama_decode(context, batch) != 0:
            raise SystemExit(f"llama.cpp: expected a step of {rows} x {width} tokens to run, found that it did not")
        wanted = (self.api.llama_get_logits_ith(context, (row + 1) * width - 1) for row in range(rows))
        return np.array([[np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()] for logits in wanted])

    def run(self, prompt: np.ndarray, steps: int) -> tuple[float, list[float]]:
        context, batch = self._context(len(prompt))
        start = time.perf_counter()
        token = self._step(context, batch, prompt, 0)
        prefill = time.perf_counter() - start
        seconds = []
        for step in range(steps):
            start = time.perf_counter()
            token = self._step(context, batch, token, prompt.shape[1] + step)
            seconds.append(time.perf_counter() - start)
        return prefill, seconds


def _serve(connection: Connection, file: Path, vocab_size: int, threads: int, extra_buffers: bool) -> None:
    """The other process: sends the weights' bytes and what llama.cpp says of itself, then answers every prompt."""
    side = LlamaCpp(file, vocab_size, threads, extra_buffers)
    connection.send((side.weight_bytes, side.api.llama_print_system_info().decode()))
    with contextlib.suppress(EOFError):  # the end of the comparison
        while True:
            connection.send(side.run(*connection.recv()))


class LlamaProcess:
    """`LlamaCpp` in a process of its own.

    In one process with XLA and oneDNN its AMX products die of an illegal instruction: it configures the tiles once per
    thread, and others that use the thread do not leave them so.
    """

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        context.Process(target=_serve, args=(other, *arguments), daemon=True).start()
        other.close()
        self.weight_bytes, self.system = self._receive()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit("llama.cpp: expected an answer, found that its process has ended") from None

    def logits(self, prompt: np.ndarray) -> None:
        """None: Q8_0 is off by too much for a comparison, docs/decisions.md says by how much."""

    def run(self, prompt: np.ndarray, steps: int) -> tuple[float, list[float]]:
        self.connection.send((prompt, steps))
        return self._receive()


def sides(folder: Path, options: argparse.Namespace) -> tuple[Config, dict[str, Side]]:
    """The chosen columns, loaded; those that hold the same weights share them."""

    @cache
    def params(weights: str) -> Tree:
        return load(folder, weights=weights)[1]

    config = load_config(folder)
    if not isinstance(config, V3Config) and any(name in LLAMA for name in options.columns):
        raise SystemExit(f"llama.cpp: expected a V3 geometry, found {folder} of {config.model_type}")
    built: dict[str, Side] = {}
    for name in options.columns:
        print(f"loading {name}", file=sys.stderr)
        if name in DSJAX:
            weights, dtype = DSJAX[name]
            built[name] = Dsjax(config, params(weights), dtype)
        elif name in HUGGING_FACE:
            dtype = HUGGING_FACE[name]
            built[name] = HuggingFace(folder, config, params(dtype), dtype, options.hf_experts)
        else:
            built[name] = LlamaProcess(options.gguf, config.vocab_size, options.threads, LLAMA[name])
    return config, built


def agreement(built: dict[str, Side], config: Config) -> dict[str, dict[str, float]]:
    """How far logits of one prompt are from Hugging Face's, by column, as shares of these at each position.

    They are compared with the baseline's, without one with those of hf-float32.

    Returns:
      "typical", "worst": median and maximum over positions of |a - b| / |b|, Euclidean norms over the vocabulary;
      "greatest": the largest difference of any logit, over the largest logit. Unrelated models have a typical
      difference of 1.4. Empty without Hugging Face.
    """
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, (1, AGREEMENT_TOKENS))
    reference = next((name for name in HUGGING_FACE if name in built), None)
    expected = built[reference].logits(prompt) if reference else None
    found: dict[str, dict[str, float]] = {}
    for column, side in built.items():
        logits = side.logits(prompt) if expected is not None and column != reference else None
        if expected is not None and logits is not None:
            off = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            greatest = np.abs(logits - expected).max() / np.abs(expected).max()
            typical, worst = float(np.median(off)), float(off.max())
            found[column] = {"typical": typical, "worst": worst, "greatest": float(greatest)}
    return found


Rounds = dict[str, dict[str, list[float]]]
"""Seconds of every counted round, by column and case."""


def measure(built: dict[str, Side], config: Config, options: argparse.Namespace) -> Rounds:
    """Runs all rounds; the first warms up and is not counted."""
    random = np.random.default_rng(0)
    cases = {name: CASES[name] for name in options.cases}
    prompts = {
        name: random.integers(0, config.vocab_size, (case.batch, case.prompt_length)) for name, case in cases.items()
    }
    seconds: Rounds = {column: {case: [] for case in cases} for column in built}
    names = list(built)
    for round_ in range(options.rounds + 1):
        print(f"round {round_} of {options.rounds}" if round_ else "warming up", file=sys.stderr)
        first = round_ % len(names)
        for case_name, case in cases.items():
            for column in names[first:] + names[:first]:
                prefill, steps = built[column].run(prompts[case_name], options.new_tokens if case.decode else 0)
                if round_ > 0:
                    seconds[column][case_name].append(statistics.median(steps) if case.decode else prefill)
    return seconds


def report(
    built: dict[str, Side], seconds: Rounds, agreed: dict[str, dict[str, float]], options: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """(the Markdown table, the same and every round's seconds as one JSON object)."""
    rates = {
        column: {case: CASES[case].tokens / statistics.median(times) for case, times in by_case.items()}
        for column, by_case in seconds.items()
    }
    baseline = rates.get(BASELINE)
    lines = ["| tokens/s | " + " | ".join(HEADINGS[column] for column in built) + " |", "|---" * (len(built) + 1) + "|"]
    for case in options.cases:
        cells = []
        for column in built:
            ratio = f" ({rates[column][case] / baseline[case]:.2f}x)" if baseline and column != BASELINE else ""
            cells.append(f"{rates[column][case]:.1f}{ratio}")
        lines.append(f"| {CASES[case].heading} | " + " | ".join(cells) + " |")
    lines.append("| weights in memory | " + " | ".join(f"{s.weight_bytes / 1e9:.2f} GB" for s in built.values()) + " |")
    if agreed:
        cells = [f"{agreed[column]['typical']:.1%}" if column in agreed else "" for column in built]
        lines.append("| logits off by | " + " | ".join(cells) + " |")
    columns = {
        column: {
            "weight_bytes": side.weight_bytes,
            "tokens_per_s": rates[column],
            "ratio": {case: rates[column][case] / baseline[case] for case in rates[column]} if baseline else None,
            "logits_off_by": agreed.get(column),
            "seconds": seconds[column],
        }
        for column, side in built.items()
    }
    result: dict[str, Any] = {"rounds": options.rounds, "new_tokens": options.new_tokens, "threads": options.threads}
    result["versions"] = {"jax": version("jax")}
    for column, side in built.items():
        if isinstance(side, HuggingFace):
            result["versions"] |= {"torch": version("torch"), "transformers": version("transformers")}
            columns[column]["experts"] = side.experts
        elif isinstance(side, LlamaProcess):
            result["versions"]["llama_cpp_python"] = version("llama_cpp_python")
            columns[column]["system"] = side.system
    return "\n".join(lines), {**result, "columns": columns}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    columns = [*DSJAX, *HUGGING_FACE, *LLAMA]

    def some_of(choices: list[str]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            bad = [name for name in chosen if name not in choices]
            if bad or len(set(chosen)) < len(chosen):
                raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, each once, found {text}")
            return chosen

        return parse

    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="deepseek-v3", help="of a model that is made")
    parser.add_argument("--columns", type=some_of(columns), help=f"some of {','.join(columns)}")
    parser.add_argument("--cases", type=some_of(list(CASES)), default=list(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--hf-float32", action="store_true", help="also Hugging Face in float32 (3.4 GB more)")
    parser.add_argument("--hf-experts", help="Hugging Face's experts_implementation; its own choice by default")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp, from make_bench_gguf.py")
    parser.add_argument("--new-tokens", type=int, default=24, help="decode steps in a round (default 24, at most 96)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default 7)")
    parser.add_argument("--model", type=Path, help="a checkpoint; one of --geometry is made if there is none")
    options = parser.parse_args()
    if options.rounds < 1 or not 1 <= options.new_tokens <= 96:
        parser.error("expected at least 1 round and 1 to 96 new tokens")
    if options.columns is None:
        once = "dsjax-stored" if options.geometry in UNQUANTISED else "dsjax-fp8"  # what another column holds too
        options.columns = [name for name in DSJAX if name not in (*ASKED_FOR, once)] + [BASELINE]
        options.columns += ["hf-float32"] * options.hf_float32 + ["llama-q8"] * (options.gguf is not None)
    if any(name in LLAMA for name in options.columns):
        if options.gguf is None or not options.gguf.is_file():
            parser.error("llama.cpp: expected --gguf FILE, found no such file; make_bench_gguf.py makes one")
        if importlib.util.find_spec("llama_cpp") is None:
            parser.error("llama.cpp: expected the package llama_cpp, found none; pip install llama-cpp-python")
    options.threads = os.cpu_count() or 1
    return options


def main() -> None:
    """Runs the comparison; prints a table and, as the last line, one JSON object."""
    options = _options()
    if any(name in HUGGING_FACE for name in options.columns):
        import torch

        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        config, built = sides(checkpoint(options.model or Path(scratch) / "bench", options.geometry), options)
        print("comparing logits", file=sys.stderr)
        agreed = agreement(built, config)
        seconds = measure(built, config, options)
    text, result = report(built, seconds, agreed, options)
    print(text)
    if options.rounds < ENOUGH_ROUNDS:
        print(f"{options.rounds} rounds: for a number to be trusted, at least {ENOUGH_ROUNDS}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
