"""What QEMU is: its command line, binaries, one instance, its monitor, its migration."""
