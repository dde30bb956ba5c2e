"""What became of a machine since its command line: told to every later instance.

The live incumbent is asked, as far as QEMU can tell; what it cannot tell was noted as clients
said it (`record`). A successor gets all of it on its command line, so that it is built as it would
have been from the start; what no command line can say is told to it before it loads (`settings`).
"""
