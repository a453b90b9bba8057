"""What a network does inside: which experts it chooses, what they change, how far it sees, what it costs."""
