"""`compare`: tuners x learning rates x seeds on one task, line by line, so that it can stop at any moment."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from peft_reslora.experiments.budget import Budget, count_parameters, match_budget, without_storage
from peft_reslora.experiments.compare_settings import CompareSettings, as_train_settings, compare_settings
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.cost import relative_cost
from peft_reslora.experiments.lines import Line, append_line, read_lines
from peft_reslora.experiments.merging import annealing, merged_metrics
from peft_reslora.experiments.processes import refuse_several_processes
from peft_reslora.experiments.provenance import fingerprint, provenance
from peft_reslora.experiments.rates import best_quarter, nearest_quarter, next_quarters, rate_of
from peft_reslora.experiments.report import write_report
from peft_reslora.experiments.run import (
    IMAGES,
    file_size,
    finite,
    measure,
    save_adapter,
    write_json,
    write_whole,
)
from peft_reslora.experiments.settings import DataSettings, as_config
from peft_reslora.experiments.summary import MethodSummary, summarize
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tasks import make_task
from peft_reslora.experiments.training import Method, Trained, fit, planned_steps, training_arguments, with_head
from peft_reslora.experiments.tuners import tuners_with_rank
from peft_reslora.export import save_as_lora

Say = Callable[[str], None]
_PROTOCOL = 2  # 1 did not know which file was which split
_CONFIG = "config.yaml"
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
    refuse_several_processes("compare")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = Path(settings.output_dir)
    _check_folder(folder, settings)
    task = make_task(as_train_settings(settings))
    if "test" not in task.data.splits:
        raise ValueError("data has no test split; name one in data.files or data.hub.")
    budgets = choose_budgets(task, settings)
    folder.mkdir(parents=True, exist_ok=True)
    for name, budget in budgets.items():
        equal = "" if budget.equal else f", {100 * (budget.ratio - 1):+.1f} %: NOT EQUAL"
        say(f"{name}: rank {budget.rank}, {budget.parameters:,} parameters{equal}")
    file = "runs.jsonl" if shard[1] == 1 else f"runs-{shard[0]}-of-{shard[1]}.jsonl"
    write_whole(folder / _CONFIG, yaml.safe_dump(as_config(settings), sort_keys=False))
    write_json(folder / f"{file.removesuffix('.jsonl')}.json", provenance(task.data.checksums))
    return Comparison(settings, task, budgets, folder / file, say)


def _check_folder(folder: Path, settings: CompareSettings) -> None:
    """Refuse to mix two comparisons in one folder, whose report would be the last one's.

    Raises:
        ValueError: if title, task or data of the settings there are others; the folder of the data does not count.
    """
    if not (folder / _CONFIG).is_file():
        return
    there = yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8"))
    if _subject(there) != _subject(as_config(settings)):
        raise ValueError(
            f"{folder} holds another comparison, {there.get('title')!r} ({_CONFIG} there has another title, task or "
            "data); give another output_dir, or delete that file to go on with the lines there."
        )


def _subject(values: Mapping[str, Any]) -> list[Any]:
    """Title, task and data; what an older version did not know had its default."""
    data = {**dataclasses.asdict(DataSettings()), **values["data"], "folder": None}
    return [values["title"], values["task"], data]


def choose_budgets(task: Task, settings: CompareSettings) -> dict[str, Budget]:
    """The rank of every method; the reference keeps its own."""
    base = without_storage(task.base)
    wanted = count_parameters(base, settings.methods[settings.reference].tuner)
    budgets = {}
    for name, method in settings.methods.items():
        if settings.match_parameters:
            _check_rank(name, method.tuner["peft_type"])
            budgets[name] = match_budget(base, method.tuner, wanted)
        else:
            count = count_parameters(base, method.tuner)
            budgets[name] = Budget(dict(method.tuner), int(method.tuner.get("r", 0)), count, count / wanted)
    return budgets


def _check_rank(name: str, peft_type: str) -> None:
    """Refuse a tuner whose number of parameters no rank sets.

    Raises:
        ValueError: naming the method, and the tuners that have a rank.
    """
    ranked = tuners_with_rank()
    if peft_type not in ranked:
        raise ValueError(
            f"methods.{name}: {peft_type} has no rank, so that it cannot have as many parameters as the reference. "
            f"Set match_parameters=false, or take one of {', '.join(ranked)}."
        )


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
        """Those that `run` would find done with these settings, and no others that lie in the folder."""
        there = {line["key"]: line for line in read_lines(self.path.parent)}
        return [
            line
            for name in self.settings.methods
            for line in self._protocol(name, lambda kind, name, k, seed: there.get(self._key(kind, name, k, seed)))
        ]

    def report(self) -> list[MethodSummary]:
        """Write table, plots and REPORT.md from the lines there are."""
        settings = self.settings
        names, lower_is_better = list(settings.methods), self.task.lower_is_better
        summaries = summarize(names, settings.reference, self.budgets, self.lines(), lower_is_better)
        write_report(Path(settings.output_dir), settings, self.task, summaries)
        return summaries

    def run_method(self, name: str) -> None:
        """Its cost, its search for a rate, its runs at the best one; each only if its line is not there."""
        self._protocol(name, self._once)

    def _protocol(self, name: str, get: Callable[[str, str, int, int], Line | None]) -> list[Line]:
        """The lines of a method, as far as `get` gives them; without a whole search there is no best rate."""
        settings = self.settings
        lines = [get("cost", name, 0, 0)]
        scores: dict[int, float] = {}  # higher is better
        sign = -1 if self.task.lower_is_better else 1
        low, high = (nearest_quarter(rate) for rate in (settings.rates.lowest, settings.rates.highest))
        while quarters := next_quarters(scores, low, high):
            searched = [get("search", name, k, settings.search_seed) for k in quarters]
            lines += searched
            if None in searched:
                break
            for k, line in zip(quarters, searched, strict=True):
                scores[k] = math.nan if line is None or line["validation"] is None else sign * line["validation"]
        else:
            lines += [get("report", name, best_quarter(scores), seed) for seed in settings.seeds]
        return [line for line in lines if line is not None]

    def _key(self, kind: str, name: str, k: int, seed: int) -> str:
        """What a line is found by; a cost is relative to the reference, so its tuner counts there.

        Whether a method is annealed as well changes its reported runs, and neither its cost nor its search.
        """
        others: list[Any] = [self.budgets[self.settings.reference].tuner] if kind == "cost" else []
        if kind == "report" and self.settings.methods[name].annealed:
            others = ["annealed"]
        return fingerprint([kind, self._identity(name), k, seed, *others])

    def _once(self, kind: str, name: str, k: int, seed: int) -> Line:
        key = self._key(kind, name, k, seed)
        if found := next((line for line in read_lines(self.path.parent) if line["key"] == key), None):
            return found
        make = {"cost": self._cost, "search": self._search, "report": self._report}[kind]
        line: Line = {"key": key, "identity": self._identity(name), "kind": kind, "method": name, "seed": seed}
        line |= {"rate": rate_of(k), "quarter": k, "device": device_name()}
        line |= finite(make(name, k, seed))
        append_line(self.path, line)
        shown = {n: line[n] for n in ("validation", "test", "step_ratio", "train_seconds") if line.get(n) is not None}
        run = "" if kind == "cost" else f", rate {line['rate']:g}, seed {seed}"
        self.say(f"{kind} {name}{run}: {shown}")
        return line

    def _identity(self, name: str) -> str:
        return fingerprint(run_identity(self.settings, name, self.budgets[name].tuner, self.task))

    def _cost(self, name: str, k: int, seed: int) -> dict[str, Any]:
        own, reference = (
            with_head(self.budgets[method].tuner, self.task) for method in (name, self.settings.reference)
        )
        batch = self.settings.training.get("per_device_train_batch_size", 16)
        steps = planned_steps(self.settings.training, len(self.task.train))
        return relative_cost(self.task, own, reference, self.settings.cost_pairs, batch, steps)

    def _search(self, name: str, k: int, seed: int) -> dict[str, Any]:
        trained = self._fit(name, k, seed)
        metrics = self.task.evaluate(trained.model, "validation")
        return {
            "validation": math.nan if trained.diverged else metrics[self.task.metric],
            "metrics": metrics,
            "losses": [round(loss, 5) for _, loss in trained.losses],
            "train_seconds": round(trained.seconds, 2),
        }

    def _report(self, name: str, k: int, seed: int) -> dict[str, Any]:
        trained = self._fit(name, k, seed, self._watched(name) if seed == self.settings.seeds[0] else ())
        found = measure(self.task, trained, self.settings.calibration_rows, ["test"])
        return {
            **found,
            "validation": found["before_merge"]["validation"][self.task.metric],
            "test": math.nan if trained.diverged else found["before_merge"]["test"][self.task.metric],
            "merged": {n: m[self.task.metric] for n, m in found["after_merge"].get("test", {}).items()},
            **({} if trained.diverged else saved_sizes(trained)),
            **(self._annealed(name, k, seed) if self.settings.methods[name].annealed else {}),
        }

    def _annealed(self, name: str, k: int, seed: int) -> dict[str, Any]:
        """The test metric after the same training with annealing, before and after its merge, which is exact."""
        trained = self._fit(name, k, seed, annealing(self.task, self.settings.calibration_rows))
        if trained.diverged:
            return {"annealed": math.nan}
        before = self.task.evaluate(trained.model, "test")
        merged = merged_metrics(self.task, trained.model, ["test"])["test"]["annealed"]
        return {"annealed": merged[self.task.metric], "annealed_before_merge": before[self.task.metric]}

    def _watched(self, name: str) -> tuple[TrainerCallback, ...]:
        """Draws what the method generates as it learns, where the task generates something to look at."""
        if self.task.watch is None:
            return ()
        return (self.task.watch(self.path.parent / IMAGES / file_name(name), name),)

    def _fit(self, name: str, k: int, seed: int, callbacks: tuple[TrainerCallback, ...] = ()) -> Trained:
        method = Method(self.budgets[name].tuner, self.settings.methods[name].loraplus_lr_ratio)
        steps = planned_steps(self.settings.training, len(self.task.train))
        with tempfile.TemporaryDirectory() as scratch:
            training = {**self.settings.training, **_QUIET, "learning_rate": rate_of(k)}
            arguments = training_arguments(training, seed, Path(scratch), "none")
            return fit(self.task, method, arguments, steps, callbacks, quiet=True)


def file_name(name: str) -> str:
    """A method's name as that of a file; two names differ in what was replaced as well."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return plain if plain == name.lower().replace(" ", "-") else f"{plain}-{fingerprint(name)[:6]}"


def run_identity(settings: CompareSettings, name: str, tuner: Mapping[str, Any], task: Task) -> list[Any]:
    """Everything that decides a run's numbers but rate and seed: the data by their checksums, not by their place.

    The checksums go by split, and columns of the Hub count under the names they get.

    Only what differs from the defaults counts, so that a setting that is added later leaves the lines valid. When the
    meaning of a line changes, `_PROTOCOL` does.
    """
    base = dataclasses.replace(settings.base, pretrain=None)
    data = dataclasses.replace(settings.data, folder=None, hub=None, files={})
    pretrained = Path(str(task.base.name_or_path)).name if settings.base.pretrain else None  # named by its content
    method = [name, dict(tuner), settings.methods[name].loraplus_lr_ratio]
    sizes = [settings.calibration_rows, settings.cost_pairs]
    hub = None if settings.data.folder else settings.data.hub
    read = [task.data.checksums, hub.rename if hub else {}]
    training = {key: value for key, value in settings.training.items() if key not in _PLACE}
    made_of = [settings.task, task.metric, chosen(base), pretrained, chosen(data), *read]
    return [_PROTOCOL, *made_of, training, sizes, method]


def chosen(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as JSON has them."""
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(settings)
    }
    differ = {name: value for name, value in vars(settings).items() if value != defaults[name]}
    return {name: chosen(value) if dataclasses.is_dataclass(value) else value for name, value in differ.items()}


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
