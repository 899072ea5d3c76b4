"""What pruning the adapters of half of the layers costs, after training with and without dropped layers.

    python benchmarks/dropped_layers.py --data DATA            # one core, about 2 minutes
    python benchmarks/dropped_layers.py --quick                # to see that it runs, on made-up data

DATA holds gsm8k/train.jsonl and svamp/svamp.jsonl. A small Llama on bytes, of 8 blocks and hidden size 64, is trained
on GSM8K's text; adapters on all of its 56 linear layers are trained on SVAMP's, the same batches with and without
dropping. Accuracy of the next byte on other rows, in %: with all adapters; without those of half of the layers, by
their definition in `training/dropped_layers.py` (their updates are not added; under shortcuts they hand on); and with
the factors of these layers set to zero, as a smaller file has it, which takes them from later layers, too. Of the
halves: every second layer from the first and from the second, and the first and the last half; the mean and the worst.
Writes a JSON line per adapter to OUT.jsonl, and OUT.md; --json as well, as all benchmarks do.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, new_parser, parse, write_json
from merge_fidelity import BATCH, RANK, Batch, Task, fit, make_up_data, predictions
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.reslora.config import Shortcut
from peft_reslora.training import LayerGates, active_probability, draw_active

VARIANTS = ("LoRA", "middle", "block", "input", "MoRA")
SHORTCUTS: dict[str, Shortcut] = {"input": "input", "block": "block", "middle": "middle"}
FACTORS = ("lora_A", "lora_B", "mora_M")


def small_task(data: Path, steps: int, length: int = 64, layers: int = 8) -> Task:
    """A base model of GSM8K's bytes, and SVAMP's to train adapters on."""
    columns = {"gsm8k/train.jsonl": ("question", "answer"), "svamp/svamp.jsonl": ("Body", "Question", "Answer")}
    rows = []
    for file, names in columns.items():
        lines = (data / file).read_text(encoding="utf-8").splitlines()
        stream = list("\0".join(" ".join(str(json.loads(line)[name]) for name in names) for line in lines).encode())
        rows.append(torch.tensor(stream[: len(stream) // length * length]).view(-1, length))
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=4
        )
    )

    def sample(rows: torch.Tensor, steps: int, seed: int) -> list[Batch]:
        choice = torch.randint(len(rows), (steps * BATCH,), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": part, "labels": part} for part in rows[choice].split(BATCH)]

    for _ in fit(base, sample(rows[0], steps, 0), 3e-3):
        pass
    held_out = min(256, len(rows[1]) // 2)
    train, dev = rows[1][held_out:], rows[1][:held_out]
    dev_batches = [{"input_ids": part, "labels": part} for part in dev.split(64)]
    return Task(base, "all-linear", lambda n, seed: sample(train, n, seed), [], dev_batches)


def adapter(variant: str, targets: str | list[str]) -> Any:
    if variant == "LoRA":
        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    if variant == "MoRA":
        return MoRAConfig(r=RANK, target_modules=targets)
    return ResLoRAConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, shortcut=SHORTCUTS[variant])


def accuracy(model: nn.Module, task: Task) -> float:
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in task.dev])
    return 100 * float((predictions(model, task.dev).argmax(-1) == labels).double().mean())


def halves(number: int) -> list[list[bool]]:
    """Which layers keep their adapters."""
    alternate = [n % 2 == 0 for n in range(number)]
    first = [n < number // 2 for n in range(number)]
    return [alternate, [not kept for kept in alternate], first, [not kept for kept in first]]


def without_factors(model: nn.Module, names: list[str], kept: list[bool]) -> nn.Module:
    pruned = copy.deepcopy(model)
    for name, keeps in zip(names, kept, strict=True):
        for parameter_name, parameter in pruned.get_submodule(name).named_parameters():
            if not keeps and parameter_name.startswith(FACTORS):
                parameter.data.zero_()
    return pruned


def run(task: Task, variant: str, dropping: bool, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(task.base), adapter(variant, task.targets))
    gates = LayerGates(model)
    number = len(gates.names)
    before_steps = register_optimizer_step_pre_hook(lambda *_: gates.forget_zero_gradients())
    for step, _ in fit(model, task.train(steps, seed)):
        if dropping:
            gates.set(draw_active(number, active_probability(step / steps), seed, step))
    before_steps.remove()
    gates.open()
    result: dict[str, Any] = {"all": accuracy(model, task), "off": [], "deleted": []}
    for kept in halves(number):
        gates.set(kept)
        result["off"].append(accuracy(model, task))
        gates.open()
        result["deleted"].append(accuracy(without_factors(model, gates.names, kept), task))
    gates.remove()
    return result


def table(records: list[dict[str, Any]], base: float) -> str:
    """Means over the seeds."""
    lines = [
        "| adapter | dropping | all layers | half off: mean | worst | half deleted: mean | worst |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        for dropping in (False, True):
            runs = [r for r in records if (r["method"], r["dropping"]) == (variant, dropping)]
            if not runs:
                continue
            cells = [statistics.fmean(r["all"] for r in runs)]
            for kind in ("off", "deleted"):
                cells += [statistics.fmean(pick(r[kind]) for r in runs) for pick in (statistics.fmean, min)]
            numbers = " | ".join(f"{cell:.1f}" for cell in cells)
            lines.append(f"| {variant} | {'yes' if dropping else 'no'} | {numbers} |")
    seeds = len({r["seed"] for r in records})
    steps = records[0]["steps"]
    return "\n".join(
        [*lines, "", f"{steps} steps of {BATCH} rows, {seeds} seed(s). Without any adapter: {base:.1f}.", ""]
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of the texts; with --quick not needed")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS / "dropped_layers", help="with --quick none")
    args = parse(parser, {"steps": 4, "variants": ["LoRA"], "base_steps": 4, "out": None})
    if args.data is None and not args.quick:
        parser.error("--data is needed, unless --quick is given")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if (data := args.data) is None:
            make_up_data(data := Path(scratch) / "made_up")
        task = small_task(data, args.base_steps)
    base = accuracy(task.base, task)
    records: list[dict[str, Any]] = []
    for seed in args.seeds:
        for variant in args.variants:
            for dropping in (False, True):
                record = {"method": variant, "dropping": dropping, "seed": seed, "steps": args.steps}
                record |= run(task, variant, dropping, args.steps, seed)
                records.append(record)
                print(json.dumps(record), flush=True)
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.with_suffix(".jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
                    args.out.with_suffix(".md").write_text(table(records, base), encoding="utf-8")
    print(table(records, base))
    write_json(args, records)


if __name__ == "__main__":
    main()
