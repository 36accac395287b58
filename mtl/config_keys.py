"""Which keys of a run's config decide its numbers, and in which of them two configs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Options that leave a checkpoint's state what it is, bit for bit or (what ENVIRONMENT holds) to rounding.
NEUTRAL = frozenset(
    {
        "output_dir",
        "cache_dir",
        "resume_from_checkpoint",
        "allow_config_change",
        "allow_ineffective",
        "max_row_bytes",
        "max_test_examples",
        "keep_last",
        "keep_best",
        "non_finite",
        "max_skipped_steps",
        "micro_batch_tokens",
        "eval_micro_batch_tokens",
        "packing",
        "use_cpu",
        "deterministic",
    }
)


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_neutral(key: str) -> bool:
    """Whether a config key, dotted, leaves the numbers alone."""
    group, _, rest = key.partition(".")
    return (
        key in NEUTRAL
        or group in ("launch", "strategy", "experiment", "sweep")
        or key == "model.name_or_path"
        or (group == "tasks" and rest.endswith(".path"))
    )


def config_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One text for each config key that is not the same and decides the numbers of a run."""
    first, second = (
        dict(sorted((key, value) for key, value in flattened(config) if not is_neutral(key)))
        for config in (before, after)
    )
    return differences(first, second)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One text for each entry that is not the same; the order counts too."""
    missing = object()
    keys = [*before, *(key for key in after if key not in before)]
    odd = [key for key in keys if before.get(key, missing) != after.get(key, missing)]
    if not odd and list(before) != list(after):
        odd = [next(a for a, b in zip(before, after, strict=True) if a != b)]
    return [f"{key} was {before.get(key, 'not set')}, is {after.get(key, 'not set')}" for key in odd]
