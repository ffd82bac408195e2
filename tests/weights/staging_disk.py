"""Disks that misbehave: one that dies, fills up or fails at a chosen step, and one that keeps a log
from which every state a power cut may leave can be made."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusewright.weights._fs import FileSystem


class Killed(BaseException):
    """Stands for a process that is gone: nothing it would still do reaches the disk."""


class FaultyDisk(FileSystem):
    """Counts the steps that change the disk, and dies at one of them.

    ``how``: just ``before`` it, or ``half`` through it if it writes. ``refuse`` gives an errno for
    a step by (operation, how often it has been called). ``most`` bytes are written at a time.
    """

    def __init__(
        self,
        at: int = -1,
        how: str = "before",
        *,
        exchanges: bool = True,
        die: Callable[[], None] | None = None,
        refuse: Callable[[str, int], int] = lambda op, count: 0,
        most: int = 1 << 40,
    ) -> None:
        self.at, self.how, self.exchanges, self.most = at, how, exchanges, most
        self.steps: list[str] = []
        self.written = 0
        self._die, self._refuse, self._dead = die, refuse, False
        self._counts: dict[str, int] = {}
        self._open: set[int] = set()

    def _step(self, op: str, do: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if self._dead:
            raise Killed
        count = self._counts[op] = self._counts.get(op, -1) + 1
        if code := self._refuse(op, count):
            raise OSError(code, os.strerror(code))
        self.steps.append(op)
        if len(self.steps) - 1 != self.at:
            return do()
        if self.how == "half":
            half()
        self._dead = True
        if self._die is not None:
            self._die()
        raise Killed

    def kill(self) -> None:
        """Die now."""
        self._dead = True
        raise Killed

    def bury(self) -> None:
        """Close what a dead process would have left open."""
        for fd in self._open:
            os.close(fd)
        self._open.clear()

    def open(self, path: Path, flags: int) -> int:
        fd: int = self._step("open", lambda: FileSystem.open(self, path, flags))
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._open.discard(fd)
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        data = data[: self.most]
        done: int = self._step(
            "pwrite",
            lambda: os.pwrite(fd, data, offset),
            lambda: os.pwrite(fd, data[: len(data) // 2], offset),
        )
        self.written += done
        return done

    def append(self, fd: int, data: memoryview) -> int:
        data = data[: self.most]
        done: int = self._step(
            "append", lambda: os.write(fd, data), lambda: os.write(fd, data[: len(data) // 2])
        )
        return done

    def resize(self, fd: int, size: int) -> None:
        self._step("resize", lambda: os.ftruncate(fd, size))

    def reserve(self, fd: int, size: int) -> None:
        self._step("reserve", lambda: None)

    def fsync(self, fd: int) -> None:
        self._step("fsync", lambda: None)

    def fsync_folder(self, path: Path) -> None:
        self._step("fsync_folder", lambda: None)

    def mkdir(self, path: Path) -> None:
        self._step("mkdir", lambda: os.mkdir(path))

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", lambda: os.rename(source, target))

    def exchange(self, one: Path, other: Path) -> bool:
        if not self.exchanges:
            return False
        swapped: bool = self._step("exchange", lambda: FileSystem.exchange(self, one, other))
        return swapped

    def unlink(self, path: Path) -> None:
        self._step("unlink", lambda: os.unlink(path))

    def rmdir(self, path: Path) -> None:
        self._step("rmdir", lambda: os.rmdir(path))


@dataclass
class Tree:
    """A disk in memory: names to nodes, nodes to bytes (None for a folder)."""

    names: dict[str, int] = field(default_factory=dict)
    nodes: dict[int, bytearray | None] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> Tree:
        tree = cls()
        for path in sorted(root.rglob("*")):
            inode = path.stat().st_ino
            tree.names[path.relative_to(root).as_posix()] = inode
            tree.nodes[inode] = None if path.is_dir() else bytearray(path.read_bytes())
        return tree

    def copy(self) -> Tree:
        nodes = {k: None if v is None else bytearray(v) for k, v in self.nodes.items()}
        return Tree(dict(self.names), nodes)

    def name(self, op: tuple[Any, ...]) -> None:
        """Apply an operation on names."""
        match op:
            case ("mkdir", path, node):
                self.names[path], self.nodes[node] = node, None
            case ("create", path, node):
                self.names[path] = node
                self.nodes.setdefault(node, bytearray())
            case ("unlink" | "rmdir", path):
                self.names.pop(path)
            case ("rename", a, b):
                self.names |= {b + k[len(a) :]: self.names.pop(k) for k in self._below(a)}
            case ("exchange", a, b):
                one = {b + k[len(a) :]: self.names.pop(k) for k in self._below(a)}
                two = {a + k[len(b) :]: self.names.pop(k) for k in self._below(b)}
                self.names |= one | two

    def data(self, op: tuple[Any, ...]) -> None:
        """Apply an operation on a file's bytes, whether or not it has a name."""
        if op[1] not in self.nodes:
            self.nodes[op[1]] = bytearray()
        content = self.nodes[op[1]]
        assert content is not None
        match op:
            case ("write", _, offset, data):
                content.extend(bytes(max(0, offset + len(data) - len(content))))
                content[offset : offset + len(data)] = data
            case ("resize", _, size):
                content.extend(bytes(max(0, size - len(content))))
                del content[size:]

    def make(self, root: Path) -> dict[int, int]:
        """Write it all below ``root``; which real folder stands for which recorded one."""
        alias = {}
        for name in sorted(self.names):
            content, path = self.nodes[self.names[name]], root / name
            if content is None:
                path.mkdir()
                alias[path.stat().st_ino] = self.names[name]
            else:
                path.write_bytes(content)
        return alias

    def _below(self, path: str) -> list[str]:
        return [k for k in self.names if k == path or k.startswith(path + "/")]


class RecordingDisk(FaultyDisk):
    """Keeps everything that reaches the disk, in order, and replays it with losses."""

    def __init__(self, root: Path, *, exchanges: bool = True) -> None:
        super().__init__(exchanges=exchanges)
        self.root, self.log = root, list[tuple[Any, ...]]()
        self.before = Tree.of(root)
        self._alive: dict[int, int] = {}  # inode -> node; inodes are used again, nodes are not
        self._last = 1 << 60

    def _rel(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _node(self, fd: int) -> int:
        return self._alive[os.fstat(fd).st_ino]

    def open(self, path: Path, flags: int) -> int:
        new = not path.exists()
        fd = super().open(path, flags)
        if new:
            self._last += 1
            self._alive[os.fstat(fd).st_ino] = self._last
            self.log.append(("create", self._rel(path), self._last))
        if flags & os.O_TRUNC:
            self.log.append(("resize", self._node(fd), 0))
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.log.append(("write", self._node(fd), offset, bytes(data)))
        return super().pwrite(fd, data, offset)

    def append(self, fd: int, data: memoryview) -> int:
        self.log.append(("write", self._node(fd), os.fstat(fd).st_size, bytes(data)))
        return super().append(fd, data)

    def resize(self, fd: int, size: int) -> None:
        self.log.append(("resize", self._node(fd), size))
        super().resize(fd, size)

    def fsync(self, fd: int) -> None:
        self.log.append(("fsync", self._node(fd)))

    def fsync_folder(self, path: Path) -> None:
        if path != self.root.parent:
            self.log.append(("fsync_folder", self._rel(path)))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.log.append(("mkdir", self._rel(path), path.stat().st_ino))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(("rename", self._rel(source), self._rel(target)))

    def exchange(self, one: Path, other: Path) -> bool:
        if not super().exchange(one, other):
            return False
        self.log.append(("exchange", self._rel(one), self._rel(other)))
        return True

    def unlink(self, path: Path) -> None:
        self._alive.pop(path.lstat().st_ino, None)
        super().unlink(path)
        self.log.append(("unlink", self._rel(path)))

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self.log.append(("rmdir", self._rel(path)))

    def after_power_cut(self, cut: int, seed: int) -> Tree:
        """A disk as it may be found when power fails after ``cut`` operations: unsynced writes are
        kept, lost or torn, each for itself; changes of names survive in order, at least up to the
        last one whose folder was synced since."""
        log, chance, tree = self.log[:cut], random.Random(seed), self.before.copy()
        names_kept = self._names_kept(log, chance)
        for at, op in enumerate(log):
            if op[0] in ("write", "resize"):
                synced = ("fsync", op[1]) in log[at:]
                fate = "kept" if synced else chance.choice(("kept", "lost", "torn"))
                if fate == "torn" and op[0] == "write":
                    op = (*op[:3], op[3][: chance.randrange(len(op[3]) + 1)])
                if fate != "lost":
                    tree.data(op)
            elif op[0] not in ("fsync", "fsync_folder") and at < names_kept:
                tree.name(op)
        return tree

    def _names_kept(self, log: list[tuple[Any, ...]], chance: random.Random) -> int:
        sure = 0
        for at, op in enumerate(log):
            if op[0] in ("mkdir", "create", "unlink", "rmdir", "rename", "exchange"):
                paths = op[1:3] if op[0] in ("rename", "exchange") else op[1:2]
                folders = [("fsync_folder", str(Path(path).parent)) for path in paths]
                if all(folder in log[at:] for folder in folders):
                    sure = at + 1
        return chance.randint(sure, len(log))


class RebuiltDisk(FaultyDisk):
    """A disk made from a record: its folders keep the identities they had."""

    def __init__(self, alias: dict[int, int], *, exchanges: bool = True) -> None:
        super().__init__(exchanges=exchanges)
        self._alias = alias

    def identity(self, path: Path) -> int | None:
        inode = super().identity(path)
        return None if inode is None else self._alias.get(inode, inode)
