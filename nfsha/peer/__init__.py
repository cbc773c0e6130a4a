"""What this node knows of the other one, and how: sealed datagrams, links, witnesses."""
