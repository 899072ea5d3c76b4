"""A sweep over the models of the installed transformers and diffusers: what ResLoRA and MoRA make of each, shrunken
and untrained.

    PYTHONPATH=tests python -m helpers.sweep transformers --write docs/models.md (an hour on two cores, no downloads)
    PYTHONPATH=tests python -m helpers.sweep diffusers --write docs/models.md    (minutes)
    PYTHONPATH=tests python -m helpers.sweep transformers qwen3_next swin        (these only, printed)

Each model is built with small sizes, adapted, and compared with hooks on the plain model in float64, output and
gradients. Of transformers it is a model type's default config (`transformers_models.py`), of diffusers a model class
(`diffusers_models.py`). `tests/slow/test_sweep.py` runs a few of them.
"""

from __future__ import annotations

import argparse
import copy
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from helpers import diffusers_models, oracle, transformers_models
from helpers.oracle import factors_of, randomize_adapters, relative_error, run_oracle
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.reslora.linking import chains_of

MODES = {"input": ("input", 1), "block": ("block", 1), "block of all": ("block", -1), "middle": ("middle", 1)}
MORA = "MoRA"
TOLERANCE = 1000 * torch.finfo(torch.float32).eps  # models compute norms, softmax and rotations in float32
SECONDS = 60  # of the processor, for one model


def weigh(model: nn.Module) -> nn.Module:
    """The model with weights of a size that matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scale = 1 / max(parameter[0].numel(), 1) ** 0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
        elif not parameter.any():
            parameter.data.fill_(0.1)  # gates that let nothing through
    return model


def output_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """All tensors of the output with values that are differentiable, as one vector."""
    output = model(**inputs)
    found = [value.flatten() for value in _tensors(output) if value.is_floating_point()]
    return torch.cat([value.double() for value in found])


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


@dataclass(frozen=True)
class Library:
    """Where models come from, and what is asked of them."""

    version: str
    kind: str
    names: Callable[[], list[str]]
    build: Callable[[str], nn.Module]
    inputs_of: Callable[[nn.Module], Iterable[dict[str, Any]]]
    targets_of: Callable[[str, nn.Module], Any]
    adapted: str  # what is, and what is to be known of it
    reasons: bool  # whether the page says why models are not swept
    modes: tuple[str, ...]


LIBRARIES = {
    "transformers": Library(
        transformers.__version__,
        "model types",
        transformers_models.names,
        transformers_models.build,
        transformers_models.inputs_of,
        lambda name, model: "all-linear",
        "all linear layers targeted",
        False,
        ("input", "block", "middle"),
    ),
    "diffusers": Library(
        diffusers.__version__,
        "model classes",
        diffusers_models.names,
        diffusers_models.build,
        diffusers_models.inputs_of,
        diffusers_models.targets_of,
        "all linear layers targeted; of autoencoders, and where it says so, also convolutions in one group padded "
        "with zeros, but not by MoRA. Most have layers that all get one input: those of adaptive norms and time "
        "embeddings, keys and values of cross-attention. There `input` is LoRA at twice the scaling; "
        "`describe_chains(model, batch=...)` names them",
        True,
        (*MODES, MORA),
    ),
}


@dataclass
class Verdict:
    """What became of one model: chains, links, and by shortcut 'right' or what went wrong."""

    name: str
    skipped: str = ""
    layers: int = 0
    chains: int = 0
    links: int = 0
    by_shortcut: dict[str, str] = field(default_factory=dict)

    @property
    def unclear(self) -> list[str]:
        """Wrong results, and errors that are not this library's own."""
        return [f"{s}: {v}" for s, v in self.by_shortcut.items() if v.startswith(("wrong", "crash"))]


def sweep(name: str, library: str = "transformers") -> Verdict:
    """Build the model, run it, and compare each shortcut with the oracle."""
    verdict, source = Verdict(name), LIBRARIES[library]
    try:
        with _at_most(SECONDS):
            base = weigh(source.build(name)).double().eval()
            targets = source.targets_of(name, base)
            if targets == "all-linear" and not any(isinstance(m, nn.Linear | Conv1D) for m in base.modules()):
                raise ValueError("no linear layers to adapt")
            if not targets:
                raise ValueError("no linear layers, nor convolutions of torch's own classes")
            inputs = _inputs_that_run(base, source.inputs_of(base))
            for mode in source.modes:
                verdict.by_shortcut[mode] = _compare(base, inputs, mode, targets, verdict)
    except Exception as error:
        verdict.skipped = f"{type(error).__name__}: {_first_line(error)}"
    return verdict


def _inputs_that_run(base: nn.Module, candidates: Iterable[dict[str, Any]]) -> dict[str, Any]:
    errors = []
    for inputs in candidates:
        inputs = {key: _in_double(value) for key, value in inputs.items()}
        try:
            first, second = (output_of(copy.deepcopy(base), inputs) for _ in range(2))
            first.sum().backward()
        except Exception as error:
            errors.append(error)
            continue
        if first.requires_grad and torch.isfinite(first).all() and torch.equal(first, second):
            return inputs
    raise ValueError(f"none of the inputs runs, the first with: {_first_line(errors[0]) if errors else 'no gradient'}")


def _in_double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _compare(base: nn.Module, inputs: dict[str, Any], mode: str, targets: Any, verdict: Verdict) -> str:
    config: Any = MoRAConfig(r=2, mora_type="sharing", target_modules="all-linear")
    if mode != MORA:
        shortcut, pre_num = MODES[mode]
        config = ResLoRAConfig(r=2, target_modules=targets, shortcut=shortcut, pre_num=pre_num)
    try:
        model = randomize_adapters(get_peft_model(copy.deepcopy(base), config)).double().eval()
    except Exception as error:
        return f"{'refused' if _is_ours(error) else 'crash'}: {_first_line(error)}"
    chains = [chain.names for chain in chains_of(model, "default")]
    if chains:
        verdict.layers, verdict.chains = sum(map(len, chains)), len(chains)
        verdict.links = verdict.layers - verdict.chains
    try:
        actual = output_of(model, inputs)
        probe = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (actual * probe).sum().backward()
    except Exception as error:
        return f"{'error' if _is_ours(error) else 'crash'}: {_first_line(error)}"
    if mode == MORA:
        expected, pairs = _with_squares(base, inputs, model)
    else:
        expected, pairs = _with_chains(base, inputs, model, chains, mode)
    (expected * probe).sum().backward()
    return _judge(actual, expected, pairs)


Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # a parameter of ours, and the oracle's copy


def _with_chains(
    base: nn.Module, inputs: dict[str, Any], model: nn.Module, chains: list[list[str]], mode: str
) -> tuple[torch.Tensor, Pairs]:
    factors = factors_of(model)
    with _replaced(oracle, "chains_by_block", lambda *_: chains):
        expected = run_oracle(base, inputs, factors, *MODES[mode], output_of)
    pairs = []
    for name, (A, B, _) in factors.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        pairs += [(layer.lora_A["default"].weight, A), (layer.lora_B["default"].weight, B)]
    return expected, pairs


def _with_squares(base: nn.Module, inputs: dict[str, Any], model: nn.Module) -> tuple[torch.Tensor, Pairs]:
    """MoRA with sharing, as the matrices that its compression and decompression are."""
    base, pairs = copy.deepcopy(base), []
    for name, layer in model.named_modules():
        if not hasattr(layer, "mora_M"):
            continue
        ours = layer.mora_M["default"]
        square, q = ours.detach().clone().requires_grad_(), len(ours)
        entries = torch.arange(-(-layer.in_features // q) * q)
        compress = torch.zeros(q, layer.in_features, dtype=torch.float64)
        compress.index_put_((entries % q, entries % layer.in_features), torch.ones(()).double(), accumulate=True)
        delta = (square @ compress)[torch.arange(layer.out_features) % q]
        base.get_submodule(name.removeprefix("base_model.model.")).register_forward_hook(
            lambda module, args, output, delta=delta: output + args[0] @ delta.T
        )
        pairs.append((ours, square))
    return output_of(base, inputs), pairs


def _judge(actual: torch.Tensor, expected: torch.Tensor, pairs: Pairs) -> str:
    worst = relative_error(actual, expected)
    largest = max((float(leaf.grad.norm()) for _, leaf in pairs if leaf.grad is not None), default=0.0)
    for ours, leaf in pairs:
        gradients = (torch.zeros_like(leaf) if p.grad is None else p.grad.double() for p in (ours, leaf))
        actual, expected = gradients
        difference = (actual - expected).norm() / max(float(expected.norm()), 1e-3 * largest)
        worst = max(worst, float(difference))
    return "right" if worst < TOLERANCE else f"wrong by {worst:.1e}"


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "peft_reslora" in Path(frames[-1].filename).parts


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _replaced(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_HEAD = """# Models

Made by `PYTHONPATH=tests python -m helpers.sweep LIBRARY --write docs/models.md`: models in small sizes, output and
gradients compared with the plain model in float64. *right* is right up to rounding; *refused* is refused at injection,
*error* in the forward pass, both with the cause. Where `input` and `middle` are not right, use `block`, or leave the
layers out that the message names.
"""


def page(library: str, verdicts: list[Verdict], before: str = "") -> str:
    """The page in Markdown, with the verdicts on one library and what `before` says of others."""
    parts = re.split(r"^## (.+)$", before, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True)) | {library: _section(library, verdicts)}
    return "\n".join([_HEAD, *(f"## {name}\n\n{sections[name].strip()}\n" for name in LIBRARIES if name in sections)])


def _section(library: str, verdicts: list[Verdict]) -> str:
    source = LIBRARIES[library]
    verdicts = sorted(verdicts, key=lambda verdict: verdict.name)
    swept, others = ([v for v in verdicts if bool(v.skipped) is skipped] for skipped in (False, True))
    count = len({v.name.removesuffix(diffusers_models.CONVOLVED) for v in swept})
    columns = [source.kind, "layers", "chains", "links", *source.modes, "what to do"]
    more = f"{len(others)} more were not swept, since no small model of them could be built and run without their own"
    named = f"{more} preparation: {', '.join(v.name for v in others)}."
    explained = [f"{more} preparation:", "", *(f"- {v.name}: {v.skipped.partition(': ')[2]}" for v in others)]
    lines = [
        f"{count} {source.kind} of {library} {source.version}, {source.adapted}.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + " --- |" * len(columns),
        *(_row(v, source.modes) for v in swept),
        "",
        *(explained if source.reasons else [named]),
    ]
    return "\n".join(lines)


def _row(v: Verdict, modes: Iterable[str]) -> str:
    words = [v.by_shortcut.get(mode, "-").split(":")[0] for mode in modes]
    reasons = dict.fromkeys(verdict for verdict in v.by_shortcut.values() if verdict != "right")
    advice = "; ".join(reason.replace("|", "/")[:300] for reason in list(reasons)[:1])
    return f"| {v.name} | {v.layers} | {v.chains} | {v.links} | {' | '.join(words)} | {advice} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path, help="the page, of which the library's section is replaced")
    args = parser.parse_args()
    verdicts = []
    for name in args.names or LIBRARIES[args.library].names():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts.append(sweep(name, args.library))
        sys.stdout.write(f"{verdicts[-1]}\n")
        sys.stdout.flush()
    if args.write:
        before = args.write.read_text(encoding="utf-8") if args.write.exists() else ""
        args.write.write_text(page(args.library, verdicts, before), encoding="utf-8")
    return 1 if any(v.unclear for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
