"""Definitions of tables: a folder with table.yaml, which all rows share, and one YAML file per row."""

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from memformer.errors import InputError
from memformer.utils.checks import refuse_unknown_keys
from memformer.utils.yaml_files import read_yaml

TABLE_FILE = "table.yaml"
# Replaced by the value of --data.
DATA_PLACE = "{data}"

Metric = Literal["perplexity", "bits_per_byte", "bits_per_token"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    Attributes:
        key: Name of the row's file and prefix of its run folders.
        name: Name of the row in the table.
        paper: The paper's results by metric; empty if the paper has none.
        model_type: Type of the model.
        scales: For each scale of the row, the changes to the table's config.
        curves: The row's x coordinate in each curve that it belongs to.
    """

    key: str
    name: str
    model_type: str
    scales: dict[str, dict[str, Any]]
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    curves: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """The settings shared by the rows of a table at one scale.

    Attributes:
        run: Config for `memformer train`, without the model.
        models: Model config for each model type.
        metric: Metric by which the rows are compared; lower is better.
        flops_tokens: Sequence length in tokens for which the table counts operations.
        note: Note for readers of the table.
        changes_of: Scale whose row changes are used. None: this scale.
    """

    run: dict[str, Any]
    models: dict[str, dict[str, Any]]
    metric: Metric
    flops_tokens: int
    note: str
    changes_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper, or a substitute for one.

    Attributes:
        key: Name of the table's folder.
        title: Title of the table.
        scales: Settings by scale.
        rows: The rows, in order.
        data_sets: For each subfolder of the data folder, where to get its files.
    """

    key: str
    title: str
    scales: dict[str, ScaleConfig]
    rows: list[Row]
    data_sets: dict[str, str] = dataclasses.field(default_factory=dict)

    def config_of(self, row: Row, scale: str, *, data: str) -> dict[str, Any]:
        """Return the config of a row's run; `data` is the folder with the data sets.

        Raises:
            InputError: The row does not have this scale, or the scale has no config for its model type.
        """
        shared, changes = self.scale(scale), self._changes(row, scale)
        if changes is None:
            raise InputError(f"row {row.key} of {self.key} has no scale {scale!r}; it has {', '.join(row.scales)}")
        if row.model_type not in shared.models:
            raise InputError(f"{self.key} has no config for models of type {row.model_type!r} at scale {scale!r}")
        config = copy.deepcopy(shared.run)
        config |= {"model_type": row.model_type, "model": copy.deepcopy(shared.models[row.model_type])}
        filled: dict[str, Any] = _fill(_merge(config, changes), data)
        return filled

    def rows_at(self, scale: str) -> list[Row]:
        """Return the rows that exist at a scale.

        Raises:
            InputError: The table does not have this scale.
        """
        return [row for row in self.rows if self._changes(row, scale) is not None]

    def choose(self, keys: Iterable[str]) -> list[Row]:
        """Return the rows with these keys, each once.

        Raises:
            InputError: The table does not have such a row.
        """
        known = {row.key: row for row in self.rows}
        keys = list(dict.fromkeys(keys))
        if unknown := [key for key in keys if key not in known]:
            raise InputError(f"{self.key} has no row {unknown[0]!r}; it has {', '.join(known)}")
        return [known[key] for key in keys]

    def _changes(self, row: Row, scale: str) -> dict[str, Any] | None:
        return row.scales.get(self.scale(scale).changes_of or scale)

    def scale(self, scale: str) -> ScaleConfig:
        """Return the settings of a scale.

        Raises:
            InputError: The table does not have this scale.
        """
        if scale not in self.scales:
            raise InputError(f"{self.key} has no scale {scale!r}; it has {', '.join(self.scales)}")
        return self.scales[scale]


def tables_folder() -> Path:
    """Return the folder with the tables' YAML files, which are part of the package."""
    return Path(__file__).parent / "configs"


def table_names(folder: Path) -> list[str]:
    """Return the names of the available tables."""
    return sorted(file.parent.name for file in folder.glob(f"*/{TABLE_FILE}"))


def read_table(folder: Path) -> Table:
    """Read the table in a folder.

    Raises:
        InputError: A file is missing or malformed.
    """
    file = folder / TABLE_FILE
    fields = _checked(file, Table, without={"key", "rows"})
    scales = {}
    for name, shared in fields["scales"].items():
        check_keys(shared, kind=ScaleConfig, owner=f"{file}, scale {name}")
        if shared["metric"] not in get_args(Metric):
            raise InputError(f"{file}: metric ({shared['metric']!r}) must be one of {', '.join(get_args(Metric))}")
        scales[name] = ScaleConfig(**shared)
    rows = []
    for row_file in sorted(folder.glob("*.yaml")):
        if row_file.name != TABLE_FILE:
            rows.append(Row(key=row_file.stem, **_checked(row_file, Row, without={"key"})))
    if not rows:
        raise InputError(f"{folder} has no rows; each is a YAML file beside {TABLE_FILE}")
    return Table(**{**fields, "key": folder.name, "scales": scales, "rows": rows})


def _checked(file: Path, kind: type, *, without: set[str]) -> dict[str, Any]:
    fields = read_yaml(file)
    check_keys(fields, kind=kind, without=without, owner=str(file))
    return fields


def check_keys(fields: Mapping[str, Any], *, kind: Any, owner: str, without: Collection[str] = ()) -> None:
    """Check that a mapping has the keys of a dataclass.

    Args:
        fields: The mapping.
        kind: The dataclass.
        owner: Where the mapping is, for the message.
        without: Fields of the dataclass that are no keys.

    Raises:
        InputError: A key is unknown, or one without a default is missing.
    """
    valid = [field for field in dataclasses.fields(kind) if field.name not in without]
    required = [each for each in valid if each.default is each.default_factory is dataclasses.MISSING]
    check_names(fields, required=[each.name for each in required], valid=[each.name for each in valid], owner=owner)


def check_names(
    given: Iterable[str], *, required: Sequence[str], valid: Sequence[str] | None = None, owner: str
) -> None:
    """Check the keys of a mapping.

    Args:
        given: The keys.
        required: Keys that must be there.
        valid: Keys that may be there. None: only the required ones.
        owner: Where the mapping is, for the message.

    Raises:
        InputError: A key is unknown or missing.
    """
    given = list(given)
    refuse_unknown_keys(given, valid=required if valid is None else valid, owner=owner)
    if missing := [name for name in required if name not in given]:
        raise InputError(f"{owner} lacks {missing[0]!r}")


def _merge(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes to a nested config, in place, and return it."""
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(config.get(name), dict)
        config[name] = _merge(config[name], value) if nested else value
    return config


def _fill(value: Any, data: str) -> Any:
    if isinstance(value, dict):
        return {name: _fill(each, data) for name, each in value.items()}
    if isinstance(value, list):
        return [_fill(each, data) for each in value]
    return value.replace(DATA_PLACE, data) if isinstance(value, str) else value
