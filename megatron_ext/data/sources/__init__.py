"""Where training data comes from: files, globs, folders and URLs, as rows or as Arrow batches of one text column."""

from megatron_ext.data.sources.columns import BLOCK_BYTES, ColumnBatch, column_batches
from megatron_ext.data.sources.places import COMPRESSIONS, KINDS, Meter, Source, as_source, expand, require_file
from megatron_ext.data.sources.rows import OnBad, Row, read_rows

__all__ = [
    "BLOCK_BYTES",
    "COMPRESSIONS",
    "KINDS",
    "ColumnBatch",
    "Meter",
    "OnBad",
    "Row",
    "Source",
    "as_source",
    "column_batches",
    "expand",
    "read_rows",
    "require_file",
]
