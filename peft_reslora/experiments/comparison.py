"""`compare`: tuners x learning rates x seeds on one task, line by line, so that it can stop at any moment."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from peft_reslora.experiments.budget import Budget, count_parameters, match_budget, without_storage
from peft_reslora.experiments.compare_settings import CompareSettings, as_train_settings, compare_settings
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.cost import relative_cost
from peft_reslora.experiments.lines import Line, append_line, read_lines
from peft_reslora.experiments.provenance import fingerprint, provenance
from peft_reslora.experiments.rates import best_quarter, nearest_quarter, next_quarters, rate_of
from peft_reslora.experiments.report import write_report
from peft_reslora.experiments.run import file_size, measure, save_adapter, write_json, write_whole
from peft_reslora.experiments.summary import MethodSummary, summarize
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tasks import make_task
from peft_reslora.experiments.training import Method, Trained, fit, planned_steps, training_arguments, with_head
from peft_reslora.export import save_as_lora

Say = Callable[[str], None]
_PROTOCOL = 1
_PLACE = ("use_cpu", "dataloader_num_workers")  # where and not what is computed
_QUIET: dict[str, Any] = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}


def compare(
    config: str | Path | Mapping[str, Any],
    *overrides: str,
    shard: tuple[int, int] = (1, 1),
    say: Say = lambda line: None,
) -> list[MethodSummary]:
    """Run what is not yet in the lines of `output_dir`, and write table, plots and REPORT.md from all lines there.

    Args:
        config: path of a YAML file, or the same as a mapping.
        overrides: `section.key=value`.
        shard: `(2, 4)` runs the second quarter of the methods; all shards' `runs*.jsonl` in one folder are one
            comparison.
        say: gets a line of text for every run.

    Returns:
        What is known of each method, in the order of the file.

    Raises:
        ValueError: for settings or data that cannot be right, before any training.
    """
    read = from_mapping(config, overrides) if isinstance(config, Mapping) else read_config(config, overrides)
    return prepare(compare_settings(read), shard, say).run(shard)


def prepare(settings: CompareSettings, shard: tuple[int, int], say: Say) -> Comparison:
    """Read the data, load the base, choose the ranks; nothing is trained."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = make_task(as_train_settings(settings))
    if "test" not in task.data.splits:
        raise ValueError("data has no test split; name one in data.files or data.hub.")
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    budgets = choose_budgets(task, settings)
    for name, budget in budgets.items():
        equal = "" if budget.equal else f", {100 * (budget.ratio - 1):+.1f} %: NOT EQUAL"
        say(f"{name}: rank {budget.rank}, {budget.parameters:,} parameters{equal}")
    file = "runs.jsonl" if shard[1] == 1 else f"runs-{shard[0]}-of-{shard[1]}.jsonl"
    write_whole(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    write_json(folder / f"{file.removesuffix('.jsonl')}.json", provenance(task.data.checksums))
    return Comparison(settings, task, budgets, folder / file, say)


def choose_budgets(task: Task, settings: CompareSettings) -> dict[str, Budget]:
    """The rank of every method; the reference keeps its own."""
    base = without_storage(task.base)
    wanted = count_parameters(base, settings.methods[settings.reference].tuner)
    budgets = {}
    for name, method in settings.methods.items():
        if settings.match_parameters:
            budgets[name] = match_budget(base, method.tuner, wanted)
        else:
            count = count_parameters(base, method.tuner)
            budgets[name] = Budget(dict(method.tuner), int(method.tuner.get("r", 0)), count, count / wanted)
    return budgets


@dataclass(frozen=True)
class Comparison:
    """What all runs of a comparison share."""

    settings: CompareSettings
    task: Task
    budgets: Mapping[str, Budget]
    path: Path
    say: Say

    def run(self, shard: tuple[int, int] = (1, 1)) -> list[MethodSummary]:
        """Run what is missing of the shard's methods; the report is written after each of them."""
        part, parts = shard
        for name in list(self.settings.methods)[part - 1 :: parts]:
            self.run_method(name)
            self.report()
        return self.report()

    def lines(self) -> list[Line]:
        """Those of this comparison: of these methods, with these settings and these data."""
        identities = {fingerprint(self._identity(name)) for name in self.settings.methods}
        return [line for line in read_lines(self.path.parent) if line["identity"] in identities]

    def report(self) -> list[MethodSummary]:
        """Write table, plots and REPORT.md from the lines there are."""
        settings = self.settings
        summaries = summarize(list(settings.methods), settings.reference, self.budgets, self.lines())
        write_report(Path(settings.output_dir), settings, self.task, summaries)
        return summaries

    def run_method(self, name: str) -> None:
        """Its cost, its search for a rate, its runs at the best one; each only if its line is not there."""
        self._once("cost", name, 0, 0, self._cost)
        scores: dict[int, float] = {}
        low, high = (nearest_quarter(rate) for rate in (self.settings.rates.lowest, self.settings.rates.highest))
        while quarters := next_quarters(scores, low, high):
            for k in quarters:
                line = self._once("search", name, k, self.settings.search_seed, self._search)
                scores[k] = math.nan if line["validation"] is None else line["validation"]
        for seed in self.settings.seeds:
            self._once("report", name, best_quarter(scores), seed, self._report)

    def _once(
        self, kind: str, name: str, k: int, seed: int, make: Callable[[str, int, int], dict[str, Any]]
    ) -> dict[str, Any]:
        identity = fingerprint(self._identity(name))
        key = fingerprint([kind, identity, k, seed])
        if found := next((line for line in self.lines() if line["key"] == key), None):
            return found
        line: Line = {"key": key, "identity": identity, "kind": kind, "method": name, "seed": seed}
        line |= {"rate": rate_of(k), "quarter": k, "device": device_name()}
        line |= finite(make(name, k, seed))
        append_line(self.path, line)
        shown = {n: line[n] for n in ("validation", "test", "step_ratio", "train_seconds") if line.get(n) is not None}
        run = "" if kind == "cost" else f", rate {line['rate']:g}, seed {seed}"
        self.say(f"{kind} {name}{run}: {shown}")
        return line

    def _identity(self, name: str) -> Any:
        budget = self.budgets[name]
        return run_identity(self.settings, name, budget.tuner, self.task)

    def _cost(self, name: str, k: int, seed: int) -> dict[str, Any]:
        own, reference = (
            with_head(self.budgets[method].tuner, self.task) for method in (name, self.settings.reference)
        )
        batch = self.settings.training.get("per_device_train_batch_size", 16)
        return relative_cost(self.task, own, reference, self.settings.cost_pairs, batch)

    def _search(self, name: str, k: int, seed: int) -> dict[str, Any]:
        trained = self._fit(name, k, seed)
        metrics = self.task.evaluate(trained.model, "validation")
        diverged = not math.isfinite(trained.losses[-1][1])
        return {
            "validation": math.nan if diverged else metrics[self.task.metric],
            "metrics": metrics,
            "losses": [round(loss, 5) for _, loss in trained.losses],
            "train_seconds": round(trained.seconds, 2),
        }

    def _report(self, name: str, k: int, seed: int) -> dict[str, Any]:
        trained = self._fit(name, k, seed)
        found = measure(self.task, trained, self.settings.calibration_rows, ["test"])
        return {
            **found,
            "validation": found["before_merge"]["validation"][self.task.metric],
            "test": found["before_merge"]["test"][self.task.metric],
            "merged": {n: m[self.task.metric] for n, m in found["after_merge"]["test"].items()},
            **saved_sizes(trained),
        }

    def _fit(self, name: str, k: int, seed: int) -> Trained:
        method = Method(self.budgets[name].tuner, self.settings.methods[name].loraplus_lr_ratio)
        steps = planned_steps(self.settings.training, len(self.task.train))
        with tempfile.TemporaryDirectory() as scratch:
            training = {**self.settings.training, **_QUIET, "learning_rate": rate_of(k)}
            return fit(self.task, method, training_arguments(training, seed, Path(scratch), "none"), steps, quiet=True)


def run_identity(settings: CompareSettings, name: str, tuner: Mapping[str, Any], task: Task) -> list[Any]:
    """Everything that decides a run's numbers but rate and seed: the data by their checksums, not by their place.

    Only what differs from the defaults counts, so that a setting that is added later leaves the lines valid. When the
    meaning of a line changes, `_PROTOCOL` does.
    """
    base = dataclasses.replace(settings.base, pretrain=None)
    data = dataclasses.replace(settings.data, folder=None, hub=None, files={})
    pretrained = Path(str(task.base.name_or_path)).name if settings.base.pretrain else None  # named by its content
    method = [name, dict(tuner), settings.methods[name].loraplus_lr_ratio]
    sizes = [settings.calibration_rows, settings.cost_pairs]
    checksums = sorted(task.data.checksums.values())
    training = {key: value for key, value in settings.training.items() if key not in _PLACE}
    made_of = [settings.task, task.metric, chosen(base), pretrained, chosen(data), checksums]
    return [_PROTOCOL, *made_of, training, sizes, method]


def chosen(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(settings)
    }
    return {name: value for name, value in vars(settings).items() if value != defaults[name]}


def saved_sizes(trained: Trained) -> dict[str, int | None]:
    """Bytes of the adapter's file and of its LoRA export; None where there is no exact export."""
    with tempfile.TemporaryDirectory() as scratch:
        native, exported = Path(scratch) / "native", Path(scratch) / "lora"
        save_adapter(trained, native)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that others cannot load what is measured and deleted
                save_as_lora(exported, trained.model)
        except (ValueError, NotImplementedError):
            return {"native_bytes": file_size(native), "exported_bytes": None}
        return {"native_bytes": file_size(native), "exported_bytes": file_size(exported)}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def finite(value: Any) -> Any:
    """The value with None for nan and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
