"""Recordings to train on: finding them, and endless random crops of them."""

from .crops import Crops
from .reading import read_recording
from .recordings import Recording
from .sources import find_audio

__all__ = ["Crops", "Recording", "find_audio", "read_recording"]
