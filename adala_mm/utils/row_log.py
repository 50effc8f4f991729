"""Measured rows in JSON-lines files: each is there as soon as it is measured, and nothing is ever overwritten."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from adala_mm.utils.fingerprint import sources_fingerprint
from adala_mm.utils.machine import hardware
from adala_mm.utils.records import settings

Row = dict[str, object]


class RowLog:
    """Rows of one benchmark, and where they go.

    A file that ends in ``.jsonl`` gets each row as it is added, after a head that says on what and by which sources
    the rows below it are measured. What it holds stays there. Rows of the same sources on the same machine are known,
    so that whoever is stopped can go on later; of rows with the same key the last one counts.

    Args:
        path: of such a file, or any other: then rows are kept in memory only.
        key: names of the entries that tell rows apart.
        machine: what figures depend on, as `adala_mm.utils.machine.hardware` says.
        settings: options of the benchmark, for the record.

    Raises:
        ValueError: if the file holds rows of another device.
    """

    def __init__(self, path: str | Path, key: Sequence[str], machine: Mapping, settings: Mapping) -> None:
        self.path, self.key = Path(path), tuple(key)
        self.rows: dict[tuple, Row] = {}
        self.appends = self.path.suffix == '.jsonl'
        if not self.appends:
            return
        own = dict(started=datetime.now(timezone.utc).isoformat(timespec='seconds'), machine=dict(machine),
                   sources=sources_fingerprint(), settings=dict(settings), key=self.key)
        for head, rows in read_runs(self.path) if self.path.exists() else []:
            if head['machine']['device'] != machine['device']:
                raise ValueError(f'{self.path} holds rows of {head["machine"]["device"]}, this is {machine["device"]}: '
                                 'name another folder with --out')
            if _conditions(head) == _conditions(own):
                self.rows.update((self._key(row), row) for row in rows)
        self._append(own)

    def has(self, **entries: object) -> bool:
        """Whether there is a row with these entries."""
        return any(entries.items() <= row.items() for row in self.rows.values())

    def add(self, row: Row) -> None:
        self.rows[self._key(row)] = row
        if self.appends:
            self._append(row)

    def _key(self, row: Row) -> tuple:
        return tuple(row.get(name) for name in self.key)

    def _append(self, line: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a+b') as file:
            file.seek(0, 2)
            if file.tell():  # whoever was stopped within a line has left no end of it
                file.seek(-1, 2)
                if file.read(1) != b'\n':
                    file.write(b'\n')
            file.write(json.dumps(line).encode() + b'\n')


def _conditions(head: Mapping) -> tuple[dict, str]:
    """What rows must share to stand beside each other; of commits, whether they changed the sources."""
    return {name: value for name, value in head['machine'].items() if name != 'commit'}, head['sources']


def open_log(parser: argparse.ArgumentParser, args: argparse.Namespace, key: Sequence[str],
             device: torch.device) -> RowLog:
    """That of a tool with the option ``--out``; ends the program with a message if there are rows of another device."""
    try:
        return RowLog(args.out, key, hardware(device), settings(args))
    except ValueError as error:
        parser.error(str(error))


def read_runs(path: str | Path) -> list[tuple[dict, list[Row]]]:
    """The runs that a file holds: of each its head (machine, settings, key) and its rows, in order.

    A line that whoever wrote it did not finish is told on stderr and left out.

    Raises:
        ValueError: if the file does not begin with a head.
    """
    runs: list[tuple[dict, list[Row]]] = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            print(f'{path}, line {number} is torn and left out: {line[:60]}', file=sys.stderr)
            continue
        if 'machine' in entry:
            runs.append((entry, []))
        elif runs:
            runs[-1][1].append(entry)
        else:
            raise ValueError(f'{path} does not begin with a line that says what its rows are measured on')
    return runs


def latest_rows(path: str | Path) -> tuple[list[Row], list[dict]]:
    """The last row for each key, in the order in which keys first came up, and the machines that these are from."""
    found: dict[tuple, tuple[Row, dict]] = {}
    for head, rows in read_runs(path):
        for row in rows:
            found[tuple(row.get(name) for name in head['key'])] = row, head['machine']
    machines = [machine for _, machine in found.values()]
    return [row for row, _ in found.values()], [m for i, m in enumerate(machines) if m not in machines[:i]]
