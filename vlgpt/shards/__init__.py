"""Shards: the one contract between data_prep, training and evaluation.

A data set is a folder of numbered tars with an index, a report and a manifest. `ShardWriter` makes one shard,
`write_manifest` seals the folder, `ShardSet` opens it (or a folder of foreign webdataset tars) and gives any
sample by number.
"""

from vlgpt.shards.features import (
    FeatureReader,
    FeatureWriter,
    feature_path,
    read_spec,
    write_feature_rows,
    write_spec,
)
from vlgpt.shards.foreign import ForeignStream
from vlgpt.shards.manifest import Manifest, read_manifest, write_manifest
from vlgpt.shards.reader import ShardSet
from vlgpt.shards.schema import BadSample, FeatureSpec, Sample, ShardIndex, ShardRecord, ShardReport
from vlgpt.shards.writer import ShardWriter

__all__ = [
    "BadSample",
    "FeatureReader",
    "FeatureSpec",
    "FeatureWriter",
    "ForeignStream",
    "Manifest",
    "Sample",
    "ShardIndex",
    "ShardRecord",
    "ShardReport",
    "ShardSet",
    "ShardWriter",
    "feature_path",
    "read_manifest",
    "read_spec",
    "write_feature_rows",
    "write_manifest",
    "write_spec",
]
