"""Turns conversations and texts into batches: read, clean, render, store, load."""

from eabf_jax.data.chat import TEMPLATES, Encoded, Turn, encode_conversation
from eabf_jax.data.dataset import Records, num_records, read_metadata
from eabf_jax.data.loader import make_loader, steps_per_epoch
from eabf_jax.data.prepare import Options, Report, prepare

__all__ = [
    "TEMPLATES",
    "Encoded",
    "Options",
    "Records",
    "Report",
    "Turn",
    "encode_conversation",
    "make_loader",
    "num_records",
    "prepare",
    "read_metadata",
    "steps_per_epoch",
]
