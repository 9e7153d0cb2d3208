"""Small trained models that ship with the package; see `digits`."""

from .digits import BUILTIN as BUILTIN
from .digits import DigitClassifier as DigitClassifier
from .digits import builtin_folder as builtin_folder
from .digits import digits_classifier as digits_classifier
from .digits import digits_images as digits_images
from .digits import digits_labels as digits_labels
from .digits import load_builtin as load_builtin

__all__ = [
    "BUILTIN",
    "DigitClassifier",
    "builtin_folder",
    "digits_classifier",
    "digits_images",
    "digits_labels",
    "load_builtin",
]
