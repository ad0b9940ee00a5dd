"""One function per verb: options -> library call -> printed result and exit status."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.backend import platform_of
from dsjax.bench import bench as run_bench
from dsjax.checkpoint import orbax
from dsjax.checkpoint.agreement import agree, problems
from dsjax.checkpoint.names import open_files
from dsjax.cli.common import (
    arrange,
    checkpoint_config,
    load_model,
    note,
    numerics_of,
    print_json,
    sampling_of,
    stop_ids,
)
from dsjax.cli.conversation import LiveReply, reply_text, whole_reply
from dsjax.cli.ops import note_operators, reported
from dsjax.cli.prompts import read_prompts, read_tokens
from dsjax.cli.report import bench_table
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.files import check_new_file, new_file
from dsjax.generate import Engine, check_ids
from dsjax.params import accounting, tree_bytes
from dsjax.synth import synth_config, synthesise
from dsjax.text import Stream, load_text


def synth(options: argparse.Namespace) -> int:
    """`dsjax synth`."""
    config = synth_config(options.preset, layers=options.layers, settings=dict(options.settings))
    synthesise(options.out, config, template=options.preset, seed=options.seed)
    result = {"model": str(options.out), **accounting(load_config(options.out))}
    if options.json:
        print_json(result)
    else:
        print(f"{options.out}: {result['parameters']:,} parameters, {result['bytes']:,} bytes")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """`dsjax inspect`."""
    config = load_config(options.model)
    result: dict[str, Any] = {"model": str(options.model), "model_type": config.model_type, **accounting(config)}
    found: list[str] = []
    folder = Path(options.model)
    if folder.is_dir():
        try:
            if orbax.is_converted(folder):
                result["bytes"] = tree_bytes(orbax.Converted(folder, config).leaves)
                if options.check:
                    found = list(orbax.problems(folder, config))
            else:
                with open_files(folder, config) as files:
                    agree(files, config)
                    result["bytes"] = sum(files[name].nbytes for name in files)
                    if options.check:
                        found = list(problems(files, config))
        except InputError as e:
            if not options.check:
                raise
            found = [str(e)]
    elif options.check:
        raise InputError(f"{options.model}: expected a checkpoint folder to check, found a preset")
    if options.check:
        result["problems"] = found
    if options.json:
        print_json(result)
    else:
        for key, value in result.items():
            if key != "problems":
                print(f"{key:20} {value:,}" if isinstance(value, int) else f"{key:20} {value}")
        if options.check:
            print(f"{'check':20} {'no problem found' if not found else f'{len(found)} problems'}")
    for problem in found:
        note(problem)
    return 1 if found else 0


def generate(options: argparse.Namespace) -> int:
    """`dsjax generate`."""
    folder: Path = options.model
    sampling_of(options)  # wrong flags first
    numerics = numerics_of(options)
    config = checkpoint_config(folder)
    sampling = sampling_of(options, folder)
    numerics = numerics.for_checkpoint(config, options.weights)
    text = load_text(folder)
    prompts = read_prompts(options, text, config)
    stop = stop_ids(folder, config, text)
    wanted = options.max_length or max(len(p.ids) for p in prompts) + options.max_new_tokens
    max_length = min(wanted, config.max_position_embeddings)
    if max_length < wanted:
        note(f"dsjax: --max-new-tokens, --max-length: the model has {max_length} positions; stopping there")
    batch = min(options.batch, len(prompts))
    config, params, many = load_model(options, config, numerics, batch, max_length)
    engine = Engine(config, params, numerics, text.size if text else None, many)

    streaming = len(prompts) == 1 and not options.json
    stream: Stream | LiveReply | None = None
    if streaming and text is not None:
        show = partial(print, end="", flush=True)
        parser = prompts[0].parser()
        stream = Stream(text, show) if parser is None else LiveReply(text, parser, show)
    separator = ""

    def on_token(_: int, token: int) -> None:
        nonlocal separator
        if stream is not None:
            stream.push(token)
        elif streaming:
            print(f"{separator}{token}", end="", flush=True)
            separator = ","

    sequences: list[dict[str, Any]] = []
    shown: list[str | None] = []
    ttft, steps, compiled = [], [], 0.0
    for first in range(0, len(prompts), options.batch):
        part = prompts[first : first + options.batch]
        outputs, timing = engine.generate(
            [p.ids for p in part],
            options.max_new_tokens,
            sampling,
            max_length=max_length,
            stop=stop,
            first_sequence=first,
            on_token=on_token,
        )
        ttft.append(timing.ttft_s)
        steps += timing.token_s
        compiled += timing.compile_s
        for prompt, output in zip(part, outputs, strict=True):
            entry: dict[str, Any] = {
                "prompt_ids": prompt.ids,
                "output_ids": output.ids,
                "text": text.decode(output.ids) if text else None,
                "finish_reason": output.finish_reason,
            }
            parser = prompt.parser()
            if parser is not None and text is not None:
                reply = whole_reply(text, parser, output.ids)
                if reply.problem:
                    note(f"dsjax: sequence {len(sequences)}: tool calls left in the content: {reply.problem}")
                entry |= {"reasoning": reply.reasoning, "content": reply.content}
                entry["tool_calls"] = [call.to_openai() for call in reply.tool_calls]
                shown.append(reply_text(reply))
            else:
                shown.append(entry["text"] if text else ",".join(map(str, output.ids)))
            sequences.append(entry)
    if streaming:
        if stream is not None:
            stream.finish()
        print()
    elif not options.json:
        for i, line in enumerate(shown):
            print(f"[{i}] {line}")
    ttft_s, tpot_s = float(np.median(ttft)), float(np.median(steps)) if steps else None
    if options.json:
        result = {"sequences": sequences, "ttft_s": ttft_s, "tpot_s": tpot_s, "compile_s": compiled}
        print_json(reported(result, engine.platform))
    else:
        note_operators(engine.platform)
        decoded = sum(max(len(s["output_ids"]) - 1, 0) for s in sequences)
        rate = f", {decoded / sum(steps):.1f} tokens/s" if steps else ""
        note(f"compiled in {compiled:.1f} s; time to first token {ttft_s:.3f} s{rate}")
    return 0


def score(options: argparse.Namespace) -> int:
    """`dsjax score`."""
    paths = [options.logits] + ([options.mtp_logits] if options.mtp_logits else [])
    paths = paths if jax.process_index() == 0 else []  # one process writes
    for path in paths:
        check_new_file(path)
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"--mtp-logits {options.mtp_logits}: expected another file than --logits, found the same")
    tokens = read_tokens(options.tokens)
    if options.mtp_logits and tokens.shape[1] < 2:
        raise InputError(f"{options.tokens}: expected rows of at least 2 tokens for --mtp-logits, found 1")
    numerics = numerics_of(options)
    config = checkpoint_config(options.model)
    numerics = numerics.for_checkpoint(config, options.weights)
    for i, row in enumerate(tokens.tolist()):
        check_ids(row, config, f"{options.tokens}: row {i}")
    if tokens.shape[1] > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise InputError(f"{options.tokens}: expected rows of at most {limit} tokens, found {tokens.shape[1]}")
    mtp = options.mtp_logits is not None
    config, params, many = load_model(options, config, numerics, *tokens.shape, mtp=mtp)
    engine = Engine(config, params, numerics, parallel=many)
    logits, drafts = engine.score(tokens, mtp=mtp)
    with ExitStack() as stack:  # all files or none
        temporaries = [stack.enter_context(new_file(path)) for path in paths]
        for temporary, array in zip(temporaries, (logits, drafts), strict=False):
            with temporary.open("wb") as f:
                np.save(f, array)
    result = {"logits": str(options.logits), "shape": list(logits.shape)}
    if options.json:
        print_json(reported(result, engine.platform))
    else:
        note_operators(engine.platform)
        print(f"{options.logits}: float32 {list(logits.shape)}")
    return 0


def bench(options: argparse.Namespace) -> int:
    """`dsjax bench`."""
    numerics, config = numerics_of(options), checkpoint_config(options.model)
    length = min(options.prompt_length + options.new_tokens, config.max_position_embeddings)
    held = numerics.for_checkpoint(config, options.weights)
    result = run_bench(
        options.model,
        numerics,
        parallel=arrange(options, config, held, options.batch, length),
        weights=options.weights,
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        batch=options.batch,
        soak_steps=options.soak,
    )
    platform = result["platform"] = platform_of(jax.devices()[0])
    if options.json:
        print_json(reported(result, platform))
    else:
        note_operators(platform)
        print(bench_table(result))
    return 0 if result.get("soak", {}).get("passed", True) else 1
