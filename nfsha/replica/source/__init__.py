"""The side that serves: offers its volumes and their changes to the other node, which pulls."""
