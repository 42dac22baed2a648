"""What ``monoquant conformance NAME`` runs: the kit, on everything that an installed plugin declares."""

from monoquant_core.testing.plugin import chosen_plugin, conformance_classes

if chosen_plugin():
    globals().update(conformance_classes(chosen_plugin()))
