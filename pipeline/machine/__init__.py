"""What this machine is: its GPUs, and the kind of arithmetic that it computes with."""
