"""Changes of a file that a reader of it has to notice."""

import os


def touched(file):
    os.utime(file, ns=(1, 1))


def longer(file):
    with file.open("ab") as opened:
        opened.write(b"x")


def another_header(file):
    """Change the header in its place: the file is never shorter, so a reader of this moment reads on."""
    with file.open("r+b") as opened:
        opened.seek(file.read_bytes().index(b'"format":"pt"'))
        opened.write(b'"format":"np"')


def replaced(file):
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)


def moved_away(file):
    file.rename(file.with_name("moved"))


CHANGES = (touched, longer, another_header, replaced, moved_away)


def behind_its_time(change, file):
    """Change a file, and put its time of writing back."""
    status = file.stat()
    change(file)
    if change not in (touched, moved_away):
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
