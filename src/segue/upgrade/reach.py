"""A program that says which files another process could not open for reading and writing.

    python -ISE reach.py USER GROUP GROUPS ROOT DIRECTORY FILE...

It takes on that process's rights (GROUPS are numbers with commas between) and its view of the file
system, and prints the place of each such FILE in the list, from 0, one a line.
"""

import os
import sys


def main(user: str, group: str, groups: str, root: str, directory: str, *names: str) -> None:
    if root != "/":
        os.chroot(root)
    os.chdir(directory)
    if os.geteuid() == 0:
        os.setgroups([int(each) for each in groups.split(",") if each])
        os.setresgid(int(group), int(group), int(group))
        os.setresuid(int(user), int(user), int(user))
    for number, name in enumerate(names):
        if not reachable(name):
            print(number)  # noqa: T201


def reachable(name: str) -> bool:
    return os.access(name, os.R_OK | os.W_OK, effective_ids=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
