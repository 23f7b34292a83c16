"""Reading the archives of tests."""

import tarfile


def unpack(archive, directory):
    """Unpacks a .tar.gz; without the filter of members where Python (before 3.11.4) has none."""
    with tarfile.open(archive) as file:
        file.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        file.extractall(directory)
