"""The QMP server that a machine's clients talk to."""
