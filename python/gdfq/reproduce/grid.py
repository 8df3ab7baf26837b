"""A table's cells, run one after another, one per process, or spread over ranks; whatever is finished is kept.

The folder of a grid holds `cells/`, one JSON file for each cell and seed, named by what it was made with, so that
tables which share a cell share its file; `runs/`, the run folder of each cell that is trained, from which it goes on
when it was interrupted; and the table, `NAME.md` and `NAME.json`, written anew after every cell.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from gdfq import ranks
from gdfq.api import Result, device_named, quantize
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.evaluate import evaluate
from gdfq.methods import Data
from gdfq.provenance import provenance
from gdfq.registry import METHODS
from gdfq.reproduce import render
from gdfq.reproduce.recipe import owned_settings, recipe
from gdfq.reproduce.scale import check_scale
from gdfq.reproduce.sources import Sources, named_paths
from gdfq.reproduce.tables import TABLES, Cell, Network, Table, offline
from gdfq.run.files import write_text
from gdfq.run.training_run import Stopped

# Settings of the section `run` that a result does not depend on, and the seed, which its file's name has anyway.
_WITHOUT_EFFECT = {
    "seed", "device", "workers", "channels_last", "cuda_graph", "checkpointing", "compile", "log_every",
    "checkpoint_every",
}  # fmt: skip
_OF_THE_REPORT = ("data_free", "choice", "selected", "iterations", "seconds", "versions", "config")


class Grid:
    """The cells of a table that are asked for, and where their results are.

    Args:
        name: `table1` to `table9`.
        out: folder of the results, created when it is missing.
        is_offline: on what the package ships instead of the paper's networks and images.
        data: `NAME=FOLDER` of the user's images, NAME being `cifar10`, `cifar100` or `imagenet`; FOLDER alone where the
            table has one set of images.
        weights: `KEY=FILE`, in place of pytorchcv's weights for the network KEY.
        models: keys of networks to do; none: all.
        number: of one cell to do, from 1, as `listing` gives it; None: all.
        shard: `I/N`: every N-th cell alone, from the I-th on, as one of N tasks; None: all.
        seeds, scale, settings: see `gdfq.reproduce.recipe`.

    Raises:
        GdfqError: an unknown name, key, number or setting, a value out of range, or the user's images or weights are
            not what they should be.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        *,
        is_offline: bool = False,
        data: Iterable[str] = (),
        weights: Iterable[str] = (),
        models: Iterable[str] = (),
        number: int | None = None,
        shard: str | None = None,
        seeds: Iterable[int] = (0,),
        scale: float = 1.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_scale(scale)
        self.name, self.out, self.is_offline, self.scale = name, out, is_offline, scale
        self.seeds = list(dict.fromkeys(seeds))
        self.table = _table(name, is_offline)
        self.settings = dict(settings or {})
        _check_settings(name, self.table, self.settings)
        self.sources = _sources(self.table, is_offline, list(data), list(weights))
        cells = dict(enumerate(self.table.cells, start=1))
        self.cells = _of_models(cells, list(models))
        self.chosen = _of_shard(_of_number(self.cells, number), shard)
        self.configs = {
            (of, seed): recipe(cell, seed, scale, self.settings)
            for of, cell in self.cells.items()
            for seed in self.seeds
        }
        self.sources.check(self.chosen.values())
        self.skipped: dict[str, list[int]] = {}
        self.failed: dict[str, str] = {}
        self._not_available: dict[Network, str] = {}
        self._float_top1: dict[Network, float] = {}
        self._teacher = lru_cache(maxsize=1)(self.sources.teacher)

    # --- what there is to do ---

    def path(self, number: int, seed: int) -> Path:
        """Of a cell's result."""
        return self.out / "cells" / f"{self._name(number, seed)}.json"

    def run_folder(self, number: int, seed: int) -> Path:
        """Of a cell's training."""
        return self.out / "runs" / self._name(number, seed)

    def _name(self, number: int, seed: int) -> str:
        cell, config = self.cells[number], self.configs[number, seed]
        made_with = {
            "weights": self.sources.digest(cell.network),
            "config": config.model_dump(mode="json", exclude={"run": _WITHOUT_EFFECT}),
        }
        digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
        return f"{cell.network.key}-{cell.method}-w{cell.bits}a{cell.bits}-{digest[:10]}-seed{seed}"

    def listing(self) -> dict:
        """The cells by number, which seeds are finished, and what is lacking; nothing is downloaded.

        Returns:
            `cells`: number, network, data, row, method, bits and finished seeds of each; `lacking`: what to put where,
            and the numbers of the cells that need it.
        """
        cells, lacking = [], {}
        for number, cell in self.chosen.items():
            finished = [seed for seed in self.seeds if self.path(number, seed).exists()]
            cells.append({"number": number, **render.facts(cell), "finished_seeds": finished})
            for reason in self._lacks_on_this_machine(cell):
                lacking.setdefault(reason, []).append(number)
        return {"table": self.name, "title": self.table.title, "cells": cells, "lacking": lacking}

    def _lacks_on_this_machine(self, cell: Cell) -> list[str]:
        return list(filter(None, [self.sources.to_download(cell.network), *self.sources.missing_images(cell)]))

    # --- doing it ---

    @ranks.one_run()
    def run(self, resume: bool = False, progress: bool = False, say: Callable[[str], None] = lambda text: None) -> dict:
        """Make every figure that is not there yet; a cell that lacks something or fails does not keep others from it.

        Of several ranks each makes every N-th cell, alone; those that are finished wait for the others.

        Args:
            resume: keep the results that `out` has, and go on with what was interrupted.
            progress: show bars.
            say: is given a line for every cell that begins; on the first rank also for all that are left out or fail.

        Returns:
            `result()`.

        Raises:
            GdfqError: `out` has some of the results and `resume` was not given, or no cell could be run.
            Stopped: Ctrl-C or SIGTERM.
        """
        ranks.from_first(lambda: self._check_new(resume))
        number, count = ranks.rank(), ranks.count()
        own = dict(list(self.chosen.items())[number::count])
        who = f"rank {number} of {count}: " if count > 1 else ""
        with ranks.together(), ranks.alone():
            self._run_cells(own, progress, lambda text: say(who + text))
        everywhere = ranks.gathered((self.skipped, self.failed))
        self.failed = {where: reason for _, failed in everywhere for where, reason in failed.items()}
        self.skipped = {}
        for skipped, _ in everywhere:
            for reason, numbers in skipped.items():
                self.skipped[reason] = sorted([*self.skipped.get(reason, []), *numbers])
        return ranks.from_first(lambda: self._finish(say))

    def _run_cells(self, cells: dict[int, Cell], progress: bool, say: Callable[[str], None]) -> None:
        for number, cell in cells.items():
            seeds = [seed for seed in self.seeds if not self.path(number, seed).exists()]
            reasons = self._lacks(cell) if seeds else []
            for reason in reasons:
                self.skipped.setdefault(reason, []).append(number)
            for seed in seeds if not reasons else ():
                say(f"{self.name}: cell {number} of {len(self.table.cells)}, seed {seed}: {render.describe(cell)}")
                self._attempt(number, seed, progress)
                self.write()

    def _finish(self, say: Callable[[str], None]) -> dict:
        notes = [f"left out {render.cells(numbers)}: {reason}" for reason, numbers in self.skipped.items()]
        notes += [f"failed: {where}: {reason}" for where, reason in self.failed.items()]
        if self.chosen and not any(self.path(number, seed).exists() for number in self.chosen for seed in self.seeds):
            raise GdfqError("\n".join([f"no cell of {self.name} could be run", *notes]))
        for note in notes:
            say(note)
        return self.write()

    def _lacks(self, cell: Cell) -> list[str]:
        """What keeps the cell from being run, after pytorchcv had its chance to download."""
        if self.sources.missing_images(cell):
            return self._lacks_on_this_machine(cell)
        if cell.network not in self._not_available:
            try:
                self._teacher(cell.network)
                return []
            except GdfqError as error:
                self._not_available[cell.network] = str(error)
        return [self._not_available[cell.network]]

    def _attempt(self, number: int, seed: int, progress: bool) -> None:
        try:
            self._run_cell(number, seed, progress)
        except (Stopped, KeyboardInterrupt):
            raise Stopped(
                f"stopped in cell {number} of {self.name}, seed {seed}; finished cells and the checkpoints of this one "
                f"are kept in {self.out}. To go on: the same command with --resume"
            ) from None
        except GdfqError as error:
            self.failed[f"cell {number}, seed {seed}"] = str(error)

    def _run_cell(self, number: int, seed: int, progress: bool) -> None:
        cell, config = self.cells[number], self.configs[number, seed]
        network, is_trained = cell.network, METHODS[cell.method].trains
        model, images = self._teacher(network), self.sources.test_images(network)
        # First of all: it reads every image and label, so that a broken one is found before anything is trained.
        top1 = {"float": self._measure_float(network, model, config, progress)}
        real = self.sources.training_images(network) if METHODS[cell.method].data is not Data.NONE else None
        folder = self.run_folder(number, seed) if is_trained else None
        spec, weights, options = self.sources.arguments(network)
        result = quantize(
            model,
            config,
            run_dir=folder,
            resume=folder is not None and folder.exists(),
            calibrate_on=None if is_trained else real,
            train_on=real if is_trained else None,
            progress=progress,
            source={
                "model": spec,
                "weights": weights and str(weights.absolute()),
                "model_args": [f"{name}={value}" for name, value in options.items()],
            },
        )
        top1["quantized"] = _top1(result.model, images, progress)
        if result.choice_state is not None:
            chosen = copy.deepcopy(result.model)
            chosen.load_state_dict(result.choice_state)
            top1["choice"] = _top1(chosen, images, progress)
        write_text(self.path(number, seed), json.dumps(self._record(cell, seed, result, top1), indent=2) + "\n")

    def _measure_float(self, network: Network, model: nn.Module, config: Config, progress: bool) -> float:
        if network not in self._float_top1:
            model.to(device_named(config.run.device))
            self._float_top1[network] = _top1(model, self.sources.test_images(network), progress)
        return self._float_top1[network]

    def _record(self, cell: Cell, seed: int, result: Result, top1: dict[str, float]) -> dict:
        report = result.report.to_dict()
        return {
            **render.facts(cell),
            "seed": seed,
            "scale": self.scale,
            "weights_sha256": self.sources.digest(cell.network),
            "test_images": len(self.sources.test_images(cell.network)),
            "top1": top1,
            **{key: report[key] for key in _OF_THE_REPORT},
            "provenance": provenance(torch.get_num_threads()),
        }

    # --- what came of it ---

    def result(self) -> dict:
        """The table, from the files of all its cells; those of other processes too.

        Returns:
            JSON values: `table`, `title`, `offline`, `seeds`, `scale`, `settings`, `machines`; `cells` with what each
            is, the `published` figures, the `results` by seed and their `summary` (`gdfq.reproduce.render.summary`);
            `missing`, numbers of cells that have not all of their results; `orderings`
            (`gdfq.reproduce.render.orderings`).
        """
        cells, records = [], []
        for number, cell in self.cells.items():
            found = [_read(path) for seed in self.seeds if (path := self.path(number, seed)).exists()]
            records += found
            cells.append(
                {
                    "number": number,
                    **render.facts(cell),
                    "published": [render.published(figure) for figure in cell.published],
                    "results": [
                        {key: record[key] for key in ("seed", "top1", "data_free", "seconds")} for record in found
                    ],
                    "summary": render.summary(found),
                }
            )
        return {
            "table": self.name,
            "title": self.table.title,
            "offline": self.is_offline,
            "seeds": self.seeds,
            "scale": self.scale,
            "settings": self.settings,
            "machines": sorted({render.machine(record["provenance"]) for record in records}),
            "cells": cells,
            "missing": [cell["number"] for cell in cells if len(cell["results"]) < len(self.seeds)],
            "orderings": render.orderings(cells),
        }

    def write(self) -> dict:
        """Write `NAME.json` and `NAME.md`; returns `result()`. Other tasks write them, too: what they have finished in
        the meantime is not written over."""
        result, written = self.result(), None
        while result != written:
            write_text(self.out / f"{self.name}.json", json.dumps(result, indent=2) + "\n")
            write_text(self.out / f"{self.name}.md", render.markdown(result))
            result, written = self.result(), result
        return result

    def _check_new(self, resume: bool) -> None:
        asked = [(number, seed) for number in self.chosen for seed in self.seeds]
        known = [key for key in asked if self.path(*key).exists() or self.run_folder(*key).exists()]
        if known and not resume:
            raise GdfqError(
                f"{self.out} already holds {len(known)} of the {len(asked)} results asked for, finished or begun: "
                "--resume keeps them and does the rest, or choose another folder with --out"
            )


def _top1(model: nn.Module, images: Dataset, progress: bool) -> float:
    return evaluate(model, images, progress=progress).top1


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GdfqError(f"{path} cannot be read ({error}): delete it, and --resume makes it anew") from error


# --- what was asked for ------------------------------------------------------------------------------------------


def _table(name: str, is_offline: bool) -> Table:
    if name not in TABLES:
        raise GdfqError(f"there is no experiment '{name}'; there are figure1, {', '.join(TABLES)}")
    return offline(TABLES[name]) if is_offline else TABLES[name]


def _check_settings(name: str, table: Table, settings: Mapping[str, Any]) -> None:
    owned = sorted(owned_settings(table.cells) & settings.keys())
    if owned:
        raise GdfqError(
            f"setting '{owned[0]}' is what the rows of {name} differ in, or has an option of its own (--seeds): leave "
            "it out"
        )


def _sources(table: Table, is_offline: bool, data: list[str], weights: list[str]) -> Sources:
    if is_offline and (data or weights):
        raise GdfqError("--offline takes the network and images that the package ships: leave --data and --weights out")
    networks = [cell.network for cell in table.cells]
    return Sources(
        named_paths("--data", data, [network.data for network in networks]),
        named_paths("--weights", weights, [network.key for network in networks]),
    )


def _of_models(cells: dict[int, Cell], models: list[str]) -> dict[int, Cell]:
    keys = list(dict.fromkeys(cell.network.key for cell in cells.values()))
    for model in models:
        if model not in keys:
            raise GdfqError(f"--models {model}: the table has no such network; it has {', '.join(keys)}")
    return {number: cell for number, cell in cells.items() if not models or cell.network.key in models}


def _of_number(cells: dict[int, Cell], number: int | None) -> dict[int, Cell]:
    if number is not None and number not in cells:
        raise GdfqError(f"--cell {number}: there are the {render.cells(list(cells))}; --list says what they are")
    return cells if number is None else {number: cells[number]}


def _of_shard(cells: dict[int, Cell], shard: str | None) -> dict[int, Cell]:
    if shard is None:
        return cells
    first, _, count = shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise GdfqError(f"--shard {shard}: it must be I/N, I from 1 to N, as 3/8 for the third of eight tasks")
    return dict(list(cells.items())[int(first) - 1 :: int(count)])
