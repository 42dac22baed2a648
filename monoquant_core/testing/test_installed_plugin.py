"""What ``monoquant conformance NAME`` runs: the kit, on everything that an installed plugin declares."""

from monoquant_core.testing.plugin import chosen_classes

globals().update(chosen_classes())
