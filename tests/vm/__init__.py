"""What needs a kernel of its own: real knfsd, real kernel clients, on User Mode Linux."""
