"""`dsjax VERB ...`: parsing, exit statuses, and the one line that errors get."""

from __future__ import annotations

import argparse
import io
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from dsjax.cli import verbs
from dsjax.cli.align import add_flags as add_align_flags
from dsjax.cli.align import align, before_jax
from dsjax.cli.chat import chat
from dsjax.cli.common import positive, seed
from dsjax.cli.convert import add_flags as add_convert_flags
from dsjax.cli.convert import convert
from dsjax.cli.export import add_flags as add_export_flags
from dsjax.cli.export import run as export
from dsjax.cli.many import join, process_flags, refuse_many
from dsjax.cli.ops import choices_of, operator_flags, ops
from dsjax.cli.plan import plan, size
from dsjax.cli.profile import add_flags as add_profile_flags
from dsjax.cli.profile import profile
from dsjax.cli.verify import add_flags as add_verify_flags
from dsjax.cli.verify import verify
from dsjax.errors import InputError
from dsjax.generate import CHUNK
from dsjax.layout import ATTENTION, DISPATCH, O_GROUPS
from dsjax.parallel import SPMD
from dsjax.params import WEIGHTS
from dsjax.plan import RESERVE, chip_names
from dsjax.plugin import load_plugin
from dsjax.presets import PRESETS
from quant.operator import VariantError, choosing
from sharding import Plan, parse_plan
from sharding.processes import Group


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message if len(message) < 400 else message[:400] + "..."
        raise InputError(f"{self.prog.removeprefix('dsjax').strip()}: {message}".removeprefix(": "))


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_ids.__name__ = "list of ids like 1,2,3"


def _setting(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise ValueError
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
    except RecursionError:
        raise ValueError from None


_setting.__name__ = "key=value"


def _weights_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", choices=WEIGHTS, default="stored", help="what they are held as in memory")


def _numerics_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="activations and cache")
    parser.add_argument("--numerics", choices=("plain", "native"), default="plain")
    parser.add_argument(
        "--mla", choices=("auto", "absorbed", "naive"), default="auto", help="form of attention (V2, V3)"
    )
    parser.add_argument(
        "--kv",
        choices=("auto", "fp8", "bfloat16"),
        default="auto",
        help="what native holds the keys of V3.2 and V4 as; auto is fp8, as the models were trained",
    )
    _weights_flag(parser)


def _mesh_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", type=_plan, metavar="dp=1,ep=4,tp=2", help="devices by axis (default: one device)")
    parser.add_argument(
        "--attention", choices=ATTENTION, default="heads", help="what ep splits attention by: heads, or a batch's slots"
    )
    parser.add_argument(
        "--spmd", choices=SPMD, default="manual", help="who places collectives: this program, or XLA's partitioner"
    )
    parser.add_argument("--dispatch", choices=DISPATCH, default="auto", help="how tokens get to experts (slots only)")
    parser.add_argument(
        "--o-groups", choices=O_GROUPS, default="split", help="what devices that share one of V4's output groups do"
    )


def _plan(text: str) -> Plan:
    try:
        return parse_plan(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    _numerics_flags(parser)
    _mesh_flags(parser)
    operator_flags(parser)


def _conversation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system's message")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="whether to think first (default: as the model does)"
    )
    parser.add_argument("--reasoning-effort", choices=("low", "high", "max"), help="how much to think, with --thinking")
    parser.add_argument("--tools", type=Path, metavar="FILE.json", help="list of functions that the model may call")


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token; default: the model's, else 0")
    parser.add_argument("--top-p", type=float, help="default: the model's, else 1")
    parser.add_argument("--top-k", type=int, help="default: the model's, else 0, which is all")
    parser.add_argument("--seed", type=seed, default=0)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    machine = _Parser(add_help=False)
    machine.add_argument("--platform", metavar="NAME", help="cpu, cuda, tpu, or a plugin's name")
    machine.add_argument(
        "--platform-plugin", type=Path, metavar="FILE.so", help="load this PJRT plugin as the platform of --platform"
    )
    machine.add_argument("--compile-cache", type=Path, metavar="DIR", help="keep compiled programs here")
    result = _Parser(add_help=False)
    result.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    common = _Parser(add_help=False, parents=[machine, result])
    parser = _Parser(prog="dsjax", description="DeepSeek models in JAX, in their own quantised bytes.")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    p = commands.add_parser("synth", parents=[common], help="make a checkpoint with random weights")
    p.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--layers", type=positive, metavar="N")
    p.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", dest="settings")
    p.add_argument("--seed", type=seed, default=0)
    p.set_defaults(run=verbs.synth)

    p = commands.add_parser("inspect", parents=[common], help="count parameters and bytes; check a checkpoint")
    p.add_argument("model", metavar="DIR_OR_PRESET")
    p.add_argument("--check", action="store_true", help="read every tensor; status 1 if anything is wrong")
    p.set_defaults(run=verbs.inspect)

    p = commands.add_parser("convert", parents=[common], help="write a checkpoint in another format")
    add_convert_flags(p)
    _weights_flag(p)
    p.set_defaults(run=convert)

    p = commands.add_parser("export", parents=[common], help="write StableHLO programs, golden numbers and a report")
    add_export_flags(p)
    p.add_argument("--mesh", type=_plan, metavar="dp=1,ep=8,tp=1", help="ranks (default: one device)")
    p.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", dest="settings")
    p.set_defaults(run=export)

    p = commands.add_parser("profile", parents=[result], help="what a compiler takes, and whether a bundle is that")
    add_profile_flags(p)
    p.set_defaults(run=profile)

    p = commands.add_parser("align", parents=[common], help="precision report between two sets of results")
    add_align_flags(p)
    _numerics_flags(p)
    _mesh_flags(p)
    operator_flags(p)
    p.set_defaults(run=align)

    p = commands.add_parser("verify", parents=[common], help="run a bundle by independent compilers")
    add_verify_flags(p)
    p.set_defaults(run=verify)

    p = commands.add_parser("generate", parents=[common], help="continue prompts")
    _model_flags(p)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-ids", type=_ids, metavar="1,2,3")
    source.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help='lines with "prompt", "ids" or "messages"')
    p.add_argument("--chat", action="store_true", help="--prompt is a user's message, in the model's chat format")
    _conversation_flags(p)
    p.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    p.add_argument("--max-length", type=positive, metavar="N", help="positions per sequence")
    p.add_argument("--batch", type=positive, default=8, metavar="N", help="prompts at once (default 8)")
    _sampling_flags(p)
    process_flags(p)
    p.set_defaults(run=verbs.generate)

    p = commands.add_parser("chat", parents=[machine], help="talk with a model, line by line")
    _model_flags(p)
    _conversation_flags(p)
    p.add_argument("--max-new-tokens", type=positive, metavar="N", help="per reply (default: the room left)")
    p.add_argument(
        "--max-length", type=positive, metavar="N", help="positions of the conversation (default 32768, or all)"
    )
    _sampling_flags(p)
    process_flags(p, hidden=True)
    p.set_defaults(run=chat)

    p = commands.add_parser("score", parents=[common], help="logits at every position")
    _model_flags(p)
    p.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="int [B, T], .npy or .json")
    p.add_argument("--logits", type=Path, required=True, metavar="OUT.npy", help="float32 [B, T, V]")
    p.add_argument("--mtp-logits", type=Path, metavar="OUT.npy", help="the draft's, float32 [B, T-1, V]")
    process_flags(p)
    p.set_defaults(run=verbs.score)

    p = commands.add_parser(
        "bench", parents=[common], help="time loading, prefill and decode, against what memory gives"
    )
    _model_flags(p)
    p.add_argument("--prompt-length", type=positive, default=128, metavar="N")
    p.add_argument("--new-tokens", type=positive, default=32, metavar="N")
    p.add_argument("--batch", type=positive, default=1, metavar="N")
    p.add_argument(
        "--soak", type=positive, metavar="N", help="N more decode steps; status 1 if ids change or memory grows"
    )
    process_flags(p)
    p.set_defaults(run=verbs.bench)

    p = commands.add_parser("plan", parents=[result], help="whether a model fits, how, and how fast at best")
    p.add_argument("model", metavar="DIR_OR_PRESET")
    p.add_argument("--cards", type=positive, required=True, metavar="N")
    p.add_argument("--memory", type=size, metavar="96GB", help="of each card; default: the chip's")
    p.add_argument("--reserve", type=size, default=RESERVE, metavar="3GB", help="of each card, for drivers and runtime")
    p.add_argument(
        "--chip", metavar="NAME_OR_FILE", help=f"figures for an estimate: {', '.join(chip_names())}, or TOML"
    )
    p.add_argument("--context", type=positive, default=4096, metavar="T", help="positions per sequence")
    p.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences at once")
    p.add_argument("--chunk", type=positive, default=CHUNK, metavar="N", help="tokens per sequence in a prefill step")
    p.add_argument("--mesh", type=_plan, metavar="dp=1,ep=8,tp=1", help="default: the best plan")
    p.add_argument("--aot", metavar="TOPOLOGY", help="also compile the step for TPUs, e.g. v5p:4x4x4 (needs libtpu)")
    p.add_argument("--attention", choices=ATTENTION, help="default: the better one; of a given mesh, heads")
    _numerics_flags(p)
    operator_flags(p)
    p.set_defaults(run=plan)

    p = commands.add_parser("ops", parents=[result], help="named operators, their variants, and which are taken")
    p.add_argument("--platform", metavar="NAME", help="show what is chosen for it: cpu, cuda, tpu, or a plugin's name")
    operator_flags(p)
    p.set_defaults(run=ops)
    return parser


def _join(options: argparse.Namespace) -> Group | None:
    """Sets the platform, and meets the other processes of this run, if there are any; no device is touched yet.

    Raises:
      InputError: naming the flag, or the process.
    """
    quiet = options.run in (verbs.synth, verbs.inspect, convert, export) or (options.run is align and not options.model)
    if quiet and not options.platform:
        jax.config.update("jax_platforms", "cpu")  # these need no accelerator, and must not claim one
    if options.platform_plugin:
        if not options.platform:
            raise InputError(f"--platform-plugin {options.platform_plugin}: expected --platform, its name, found none")
        load_plugin(options.platform, options.platform_plugin)
    if options.platform:
        jax.config.update("jax_platforms", options.platform)
    if options.run is align:
        before_jax(options)
    if options.run is chat:
        refuse_many(options, "chat")
    return join(options) if options.run in (verbs.generate, verbs.score, verbs.bench) else None


def _start_jax(options: argparse.Namespace) -> None:
    """Sets the compilation cache, and makes sure that there is a device.

    Raises:
      InputError: naming the flag.
    """
    if options.compile_cache:
        try:
            options.compile_cache.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"--compile-cache {options.compile_cache}: {e.strerror}") from None
        jax.config.update("jax_compilation_cache_dir", str(options.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # jax asserts that a known platform without a device exists
        where = f"--platform {options.platform}" if options.platform else "environment variable JAX_PLATFORMS"
        raise InputError(f"{where}: expected a platform with a device, found none: {e}") from None


def _end(group: Group | None, status: int, line: str) -> int:
    """Says why this process ends, to the user and to the other processes."""
    if group is not None:
        group.fail(line, status)
    print(f"dsjax: {line}", file=sys.stderr)
    return status


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
      0 done, 1 a negative verdict, 2 bad input or environment (one line on standard error). One of several processes
      does not return from an error: it ends here, so that it does not wait for the others on its way out.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character shows a mark instead
        sys.stdout.reconfigure(errors="replace")
    group = None
    try:
        options = build_parser().parse_args(arguments)
        starts = options.run not in (plan, ops, profile)
        group = _join(options) if starts else None
        choices = choices_of(options)
        if starts:
            _start_jax(options)
        with choosing(choices):
            status: int = options.run(options)
        if group is not None:
            group.finish()
        return status
    except InputError as e:
        return _end(group, 2, str(e))
    except VariantError as e:
        return _end(group, 2, f"--op: {e}")
    except MemoryError as e:
        return _end(group, 2, f"not enough memory: {_short(e)}")
    except BrokenPipeError:  # the reader of our output went away
        if group is not None:
            group.fail("the reader of its output went away", shown="")
        sys.stderr.close()
        return 2
    except OSError as e:  # what no reader or writer of ours has put better
        return _end(group, 2, f"{e.filename or 'environment'}: {e.strerror or e}")
    except KeyboardInterrupt:
        return _end(group, 130, "interrupted")
    except Exception as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
            return _end(group, 2, f"not enough memory: {_short(e)}")
        if group is not None:
            group.crash(f"{type(e).__name__}: {_short(e)}", traceback.format_exc())
        raise  # a bug of ours or of the compiler's, whose traceback is wanted


def console() -> NoReturn:
    """The `dsjax` command."""
    sys.exit(main())
