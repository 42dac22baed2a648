"""The kit on every scheme of the plugin."""

from monoquant_core.testing.plugin import conformance_classes

globals().update(conformance_classes("float"))
