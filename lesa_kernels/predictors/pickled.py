"""Reads pickled data by a machine of its own, which has containers and texts but nothing that imports or calls."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias


class Name(NamedTuple):
    """A module's member that the data names; it is never looked up."""

    module: str
    member: str


class Unknown:
    """Stands for an object that would have to be made by a call."""


Rebuild: TypeAlias = Callable[[tuple[Any, ...]], object]

_MARK = object()
# Opcodes whose argument is the value that they push.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes, rebuild: dict[Name, Rebuild], persistent: Callable[[Any], object]) -> object:
    """Build what pickled data describes, as far as it consists of containers, texts and numbers.

    Args:
        data: the stream.
        rebuild: what to do for a call of a member: is given the call's arguments. Any other call makes an `Unknown`,
            and so does a set; states of objects are dropped.
        persistent: returns what a persistent id stands for.

    Returns:
        The object. It may contain itself.

    Raises:
        Exception: of whatever type, when the stream is damaged or does what torch.save does not do.
    """
    machine = _Machine(rebuild, persistent)
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.pop()


class _Machine:
    """The stack and the memo of a stream.

    Args:
        rebuild: see `read_pickle`.
        persistent: see `read_pickle`.
    """

    def __init__(self, rebuild: dict[Name, Rebuild], persistent: Callable[[Any], object]) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._rebuild = rebuild
        self._persistent = persistent

    def step(self, name: str, argument: Any) -> None:
        """Carry out an opcode."""
        push = self._stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_MARK)
            case _ if name in _LITERALS:
                push(argument)
            case _ if name in _CONSTANTS:
                push(_CONSTANTS[name])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_SET":
                push(Unknown())
            case "TUPLE":
                push(tuple(self._since_mark()))
            case _ if name in _TUPLES:
                push(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
            case "FROZENSET":
                self._since_mark()
                push(Unknown())
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self._extend([self.pop()] if name == "APPEND" else self._since_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "GLOBAL":
                push(Name(*argument.split(" ")))
            case "STACK_GLOBAL":
                member, module = self.pop(), self.pop()
                if not (isinstance(module, str) and isinstance(member, str)):
                    raise ValueError("a member's name must be a text")
                push(Name(module, member))
            case "REDUCE" | "NEWOBJ":
                arguments, called = self.pop(), self.pop()
                rebuild = self._rebuild.get(called) if isinstance(called, Name) else None
                push(Unknown() if rebuild is None else rebuild(arguments))
            case "BUILD":
                self.pop()
            case "BINPERSID":
                push(self._persistent(self.pop()))
            case _:
                raise ValueError(f"torch.save does not use the opcode {name}")

    def pop(self) -> Any:
        """Take the last object."""
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        values = []
        while (value := self.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(values)

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            return
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only what is sure to have a hash: that of tuples in tuples in tuples ends in a crash.
            target[key if isinstance(key, (str, int)) else Unknown()] = value
