"""The face of data.packing, whose names are imported from here."""

from nanochat_hf.data.packing import pack_text, pack_window, plan_rows  # noqa: F401
