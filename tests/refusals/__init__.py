"""Settings that are refused, each with its complete message, by the kind of rule."""

from refusals import layout, moe, overlap, parts, training

ALL = [row for table in (layout, moe, overlap, parts, training) for row in table.REFUSALS]
