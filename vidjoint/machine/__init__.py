"""The machine under a run: its CPUs, its memory, and the other processes of the same run."""
