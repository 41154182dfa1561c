"""What leaves the machine for the Hub."""
