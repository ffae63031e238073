"""fastdcd: distillation with DCD from a cached teacher, on planned augmentation."""

__version__ = "0.1.0"
