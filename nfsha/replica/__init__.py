"""The data: volumes, their copies from the node that serves, and what is known of each copy."""
