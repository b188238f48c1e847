"""Which of several independent jobs one is: the flags of an array of them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from util.flags import flag, require
from util.presets import launched_processes


@dataclass
class ShardArguments:
    _argument_group_name = "Shards: independent jobs that share the rows (docs/clusters.md)"

    num_shards: int = flag(1, "How many jobs share the rows.", changes_outputs=False)
    shard_index: int | None = flag(
        None, "Decode this job's share: 0 to --num_shards - 1.", changes_outputs=False
    )
    merge_shards: bool = flag(
        False, "Put finished shares together, and judge them as one job's.", changes_outputs=False
    )

    def __post_init__(self) -> None:
        require(self.num_shards > 0, f"--num_shards must be positive, got {self.num_shards}.")
        index = self.shard_index
        require(
            index is None or not self.merge_shards,
            "--shard_index and --merge_shards contradict: decode a share, or put all together?",
        )
        require(
            self.num_shards == 1 or self.sharded,
            f"--num_shards {self.num_shards} needs --shard_index, or --merge_shards True once all are done.",
        )
        require(
            index is None or 0 <= index < self.num_shards,
            f"--shard_index must lie in 0..{self.num_shards - 1}, below --num_shards, got {index}.",
        )
        require(
            not (self.sharded and launched_processes() > 1),
            "--shard_index and --merge_shards are for jobs of one process; those of torchrun share by "
            "themselves: leave the flags out, or torchrun.",
        )

    @property
    def sharded(self) -> bool:
        """Whether this is one job of several, or puts their shares together."""
        return self.shard_index is not None or self.merge_shards
