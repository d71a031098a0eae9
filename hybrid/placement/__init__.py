"""What this machine is, and (later) what goes where on it."""
