"""Lets torchvision from PyPI import beside a CPU build of torch: `make test-vllm` puts this into its environment.

PyPI's torchvision is built for torch with CUDA, so its C library does not load beside another build. It then stops at
operators that have no schema; these are declared here, and never called: what processors use of torchvision is Python.
"""

from __future__ import annotations

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
libraries = []  # torch forgets a schema with the object that declared it


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is first looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                library.define(schema)
            libraries.append(library)


sys.meta_path.insert(0, BeforeTorchvision())
