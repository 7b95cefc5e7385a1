"""Dataset formats: how a row becomes a text, a conversation or a preference. A format is one entry in ``FORMATS``."""

from megatron_ext.data.formats.fields import kind_in_words
from megatron_ext.data.formats.table import (
    AUTO,
    FIELDS,
    FORMATS,
    NO_COLUMNS,
    SNIFFED_ROWS,
    Format,
    detect_format,
    parse_row,
    require_columns,
    require_format,
    wanted_columns,
)
from megatron_ext.data.formats.values import Conversation, Message, Parsed, Preference, RowError, Text, says_something

__all__ = [
    "AUTO",
    "FIELDS",
    "FORMATS",
    "NO_COLUMNS",
    "SNIFFED_ROWS",
    "Conversation",
    "Format",
    "Message",
    "Parsed",
    "Preference",
    "RowError",
    "Text",
    "detect_format",
    "kind_in_words",
    "parse_row",
    "require_columns",
    "require_format",
    "says_something",
    "wanted_columns",
]
