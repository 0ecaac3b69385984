"""Pieces of files compared with what the device gives back: any change of any byte of a piece is found."""

import random

import pytest
from blake3 import blake3

from gemma4_moe.target.pieces import Piece, gaps, piece_of, wrong_pieces
from support.checkpoints import flip_bit

CONTENT = random.Random(5).randbytes(20_011)
BOUNDS = ((0, 4096), (4096, 4099), (4099, 4099), (5000, 20_011))
PIECES = [piece_of("f", start, memoryview(CONTENT)[start:end], number=start) for start, end in BOUNDS]
SIZES = {"f": len(CONTENT)}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


def test_a_piece_is_where_its_content_is_and_its_hash():
    assert PIECES[1] == Piece("f", 4096, 4099, blake3(CONTENT[4096:4099]).hexdigest())
    assert PIECES[1].place == ("f", 4096, 4099)
    assert PIECES[1].facts == {"number": 4096}


def test_what_is_unchanged_passes_and_is_counted(file):
    told = []
    assert wrong_pieces(file.parent, SIZES, PIECES, 10**6, hashed=told.append) == {}
    assert sorted(told) == sorted(end - start for start, end in BOUNDS)
    assert wrong_pieces(file.parent, SIZES, [], 10**6) == {}


@pytest.mark.parametrize("position", [0, 4095, 4098, 5000, 20_010])
def test_a_flipped_bit_is_found_and_its_place_named(position, file):
    flip_bit(file, position)
    start, end = next((start, end) for start, end in BOUNDS if start <= position < end)
    ((piece, words),) = wrong_pieces(file.parent, SIZES, PIECES, 10**6).items()
    assert (piece.start, piece.end) == (start, end)
    found = blake3(file.read_bytes()[start:end]).hexdigest()
    assert words == f"f: other bytes in ({start}, {end}): BLAKE3 {found}, not {piece.digest}"


def test_what_is_no_piece_is_not_looked_at(file):
    flip_bit(file, 4500)
    assert wrong_pieces(file.parent, SIZES, PIECES, 10**6) == {}


def test_of_a_file_that_is_cut_off_or_gone_every_piece_is_wrong(file):
    file.write_bytes(CONTENT[:-1])
    assert wrong_pieces(file.parent, SIZES, PIECES, 10**6) == dict.fromkeys(PIECES, "f: 20010 bytes, not 20011")
    file.unlink()
    assert wrong_pieces(file.parent, SIZES, PIECES, 10**6) == dict.fromkeys(PIECES, "f: missing")


@pytest.mark.parametrize(
    ("ranges", "size", "expected"),
    [
        ([(0, 3), (3, 7)], 7, []),
        ([(3, 7), (0, 3)], 7, []),
        ([(0, 0)], 0, []),
        ([], 7, [(0, 7)]),
        ([(0, 3), (4, 7)], 7, [(3, 4)]),
        ([(0, 4), (3, 7)], 7, [(4, 3)]),
        ([(0, 3)], 7, [(3, 7)]),
        ([(1, 9)], 7, [(0, 1), (9, 7)]),
    ],
)
def test_gaps_and_overlaps_are_told(ranges, size, expected):
    assert gaps(ranges, size) == expected
