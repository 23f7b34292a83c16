"""Many devices, and many processes, as one."""
