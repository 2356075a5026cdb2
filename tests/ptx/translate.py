"""PTX, nvcc's or Triton's, in C++: each kernel a function of one thread, up to the next point where
threads meet.

What runs is what the compiler made of the kernels, not their source. `device.h` has what the text
is written in: threads, their meetings, and memory whose every access is checked.
"""

from __future__ import annotations

import re

C_TYPES = {"pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t"}
for bits in (8, 16, 32, 64):
    C_TYPES |= {
        f"b{bits}": f"uint{bits}_t",
        f"u{bits}": f"uint{bits}_t",
        f"s{bits}": f"int{bits}_t",
    }
SPECIAL = {"%tid.x": "t->id", "%ntid.x": "b->threads", "%ctaid.x": "b->index"}
SPECIAL |= {"%nctaid.x": "b->blocks", "%laneid": "(t->id % 32)"}
INFIX = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
CALLS = ("min", "max", "copysign", "div", "rem", "fma", "sqrt", "rsqrt", "rcp", "abs", "neg")
CALLS += ("bfe", "prmt")
ORDERED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}


class Unknown(Exception):
    """An instruction that isn't known here."""


def split(text: str) -> list[str]:
    """Operands; those of a vector stay together."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", text)]


class Kernel:
    """One .entry."""

    def __init__(self, name: str, params: str, body: str, globals_: dict[str, str]) -> None:
        self.name = name
        self.symbols = dict(globals_)
        names = re.findall(r"\.param\s[^,]*?(\w+)(?:\[\d+\])?\s*(?:,|$)", params.strip())
        self.symbols |= {
            n: f"reinterpret_cast<uint64_t>(arguments[{i}])" for i, n in enumerate(names)
        }
        self.registers: list[str] = []
        self.shared = 0
        self.meetings = 0
        self.lines: list[str] = []
        body = re.sub(r"//[^\n]*", "", body)
        for statement in re.split(r"[;\n]", body):
            text = statement.strip()
            if text.count("{") != text.count("}"):  # of inline assembly, which has a scope
                text = text.strip("{}").strip()
            self.statement(text)

    # ---------------------------------------------------------------------------- declarations

    def place(self, align: int, name: str, size: int) -> None:
        """A variable in shared memory."""
        self.shared = -(-self.shared // align) * align
        self.symbols[name] = f"{self.shared}u"
        self.shared += size

    def statement(self, text: str) -> None:
        if not text or text in "{}":
            return
        if found := re.match(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>", text):
            kind, prefix, count = found.groups()
            raw = {"pred": "bool", "f32": "uint32_t", "f64": "uint64_t"}.get(kind) or C_TYPES[kind]
            self.registers.append(f"{raw} {prefix}[{count}];")
        elif found := re.match(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            self.place(int(found[1]), found[2], int(found[3]))
        elif found := re.match(r"(\$\w+):$", text):
            self.lines.append(f"{found[1].replace('$', '')}:;")
        elif not text.startswith("."):
            guard = ""
            if found := re.match(r"@(!?)(%\w+)\s+(.*)", text):
                guard, text = f"if ({found[1]}{self.register(found[2])}) ", found[3]
            op, rest = re.match(r"(\S+)\s*(.*)", text).groups()  # type: ignore[union-attr]
            code = self.instruction(op.split("."), split(rest), op)
            self.lines.append(f"{guard}{{ {code} }}")

    # -------------------------------------------------------------------------------- operands

    def register(self, name: str) -> str:
        found = re.fullmatch(r"%([a-z]+)(\d+)", name)
        if found is None:
            raise Unknown(name)
        return f"t->{found[1]}[{found[2]}]"

    def raw(self, x: str) -> str:
        """Bits, as an unsigned number."""
        negated = x.startswith("!")
        x = x.lstrip("!")
        if x in SPECIAL:
            return SPECIAL[x]
        if x.startswith("%"):
            return ("!" if negated else "") + self.register(x)
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", x):
            return f"0x{found[1]}u"
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", x):
            return f"0x{found[1]}ull"
        if re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+U?", x):
            return f"static_cast<uint64_t>({x.rstrip('U')}ll)"
        return self.symbols[x]

    def value(self, x: str, kind: str) -> str:
        if kind == "pred":
            return {"true": "true", "false": "false"}.get(x) or self.raw(x)
        if kind in ("f32", "f64"):
            return f"{'as_float' if kind == 'f32' else 'as_double'}({self.raw(x)})"
        return f"static_cast<{C_TYPES[kind]}>({self.raw(x)})"

    def put(self, target: str, expression: str, kind: str) -> str:
        """To a register, which may be wider: then as its sign says."""
        if target == "_":
            return ""
        if kind in ("f32", "f64"):
            return f"{self.register(target)} = bits_of(static_cast<{C_TYPES[kind]}>({expression}));"
        if kind == "pred":
            return f"{self.register(target)} = {expression};"
        return f"{self.register(target)} = static_cast<{C_TYPES[kind]}>({expression});"

    def address(self, x: str) -> str:
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", x)
        if found is None:
            raise Unknown(x)
        return f"{self.raw(found[1])} + ({found[2] or 0}ll)"

    # ---------------------------------------------------------------------------- instructions

    def instruction(self, op: list[str], a: list[str], text: str) -> str:
        kind = op[-1]
        flushes = "ftz" in op and kind == "f32"  # subnormal numbers are 0
        if "sat" in op or (flushes and op[0] not in ("abs", "rsqrt")):
            raise Unknown(text)
        if kind in ("f16", "bf16") and op[0] not in ("cvt", "setp"):
            raise Unknown(text)
        special = getattr(self, f"_{op[0]}", None)
        if special is not None and (code := special(op, a, kind)) is not None:
            return str(code)
        if len(a) >= 3 and op[0] in INFIX and kind != "pred":
            x, y = (self.value(v, kind) for v in a[1:3])
            return self.put(a[0], f"{x} {INFIX[op[0]]} {y}", kind)
        if op[0] in ("and", "or", "xor"):
            x, y = (self.value(v, kind) for v in a[1:3])
            return self.put(a[0], f"{x} {dict(INFIX, xor='!=')[op[0]]} {y}", kind)
        if op[0] in CALLS:
            more = {"approx": "_approx", "full": "_full", "NaN": "_nan"}.get(op[1], "")
            given = [f"flush({x})" if flushes else x for x in (self.value(v, kind) for v in a[1:])]
            return self.put(a[0], f"ptx_{op[0]}{more}({', '.join(given)})", kind)
        raise Unknown(text)

    def _mov(self, op: list[str], a: list[str], kind: str) -> str:
        if a[0].startswith("{"):
            parts = split(a[0].strip("{} "))
            width = int(kind[1:]) // len(parts)
            return "".join(
                f"{self.register(p)} = static_cast<uint{width}_t>({self.raw(a[1])} >> {width * i});"
                for i, p in enumerate(parts)
                if p.startswith("%") and p != "%temp"
            )
        if a[1].startswith("{"):
            parts = split(a[1].strip("{} "))
            width = int(kind[1:]) // len(parts)
            whole = " | ".join(
                f"static_cast<uint64_t>(static_cast<uint{width}_t>({self.raw(p)})) << {width * i}"
                for i, p in enumerate(parts)
            )
            return f"{self.register(a[0])} = {whole};"
        source = self.value(a[1], "pred") if kind == "pred" else self.raw(a[1])
        return f"{self.register(a[0])} = {source};"

    def _cvta(self, op: list[str], a: list[str], kind: str) -> str:
        return f"{self.register(a[0])} = {self.raw(a[1])};"

    def _ld(self, op: list[str], a: list[str], kind: str) -> str:
        targets = split(a[0].strip("{} ")) if a[0].startswith("{") else [a[0]]
        c, code = C_TYPES[kind], f"const auto* from = {self.memory(op, a[1], kind, len(targets))};"
        for i in range(len(targets)):
            code += f"const auto v{i} = read<{c}>(from + {i} * sizeof({c}));"
        for i, target in enumerate(targets):
            code += self.put(target, f"v{i}", kind)
        return code

    def _st(self, op: list[str], a: list[str], kind: str) -> str:
        sources = split(a[1].strip("{} ")) if a[1].startswith("{") else [a[1]]
        c, code = C_TYPES[kind], f"auto* to = {self.memory(op, a[0], kind, len(sources))};"
        for i, source in enumerate(sources):
            code += f"write<{c}>(to + {i} * sizeof({c}), {self.value(source, kind)});"
        return code

    def memory(self, op: list[str], where: str, kind: str, count: int) -> str:
        """The checked address of `count` numbers."""
        size = f"{count} * sizeof({C_TYPES[kind]})"
        if op[1] == "param":
            return f"at({self.address(where)})"
        space = {"shared": "shared", "global": "global"}[op[1]]
        return f"b->{space}({self.address(where)}, {size}, {len(self.lines)})"

    def _setp(self, op: list[str], a: list[str], kind: str) -> str:
        if kind == "bf16x2":  # the lower half's is the first
            (low, high), halves = a[0].split("|"), [f"({self.raw(v)})" for v in a[1:3]]
            x, y = (f"from_bf16({v})" for v in halves)
            code = self.put(low, f"({x} {ORDERED[op[1]]} {y})", "pred")
            x, y = (f"from_bf16({v} >> 16)" for v in halves)
            return code + self.put(high, f"({x} {ORDERED[op[1]]} {y})", "pred")
        x, y = (self.value(v, kind) for v in a[1:3])
        if kind in ("f16", "bf16"):
            x, y, kind = f"from_{kind}({x})", f"from_{kind}({y})", "f32"
        test = op[1]
        if test == "nan":
            code = f"({x} != {x} || {y} != {y})"
        elif test in ("equ", "neu", "ltu", "leu", "gtu", "geu") and kind.startswith("f"):
            opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}.get(test)
            code = f"({x} != {y})" if test == "neu" else f"!({x} {opposite} {y})"
            if test == "equ":
                raise Unknown("setp.equ")
        elif test == "ne":
            code = f"({x} < {y} || {x} > {y})" if kind.startswith("f") else f"({x} != {y})"
        else:
            code = f"({x} {ORDERED[test]} {y})"
        if op[2] in ("and", "or", "xor"):
            code += f" {dict(INFIX, xor='!=')[op[2]]} {self.value(a[3], 'pred')}"
        return self.put(a[0], code, "pred")

    def _selp(self, op: list[str], a: list[str], kind: str) -> str:
        x, y = (self.value(v, kind) for v in a[1:3])
        return self.put(a[0], f"{self.raw(a[3])} ? {x} : {y}", kind)

    def _not(self, op: list[str], a: list[str], kind: str) -> str:
        return self.put(a[0], f"{'!' if kind == 'pred' else '~'}{self.value(a[1], kind)}", kind)

    def _shl(self, op: list[str], a: list[str], kind: str) -> str:
        return self.put(
            a[0], f"shift_left({self.value(a[1], kind)}, {self.value(a[2], 'b32')})", kind
        )

    def _shr(self, op: list[str], a: list[str], kind: str) -> str:
        return self.put(
            a[0], f"shift_right({self.value(a[1], kind)}, {self.value(a[2], 'b32')})", kind
        )

    def _mul(self, op: list[str], a: list[str], kind: str) -> str:
        x, y = (self.value(v, kind) for v in a[1:3])
        if kind.startswith("f"):
            return self.put(a[0], f"{x} * {y}", kind)
        if "wide" in op:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return self.put(a[0], f"static_cast<{C_TYPES[wide]}>({x}) * {y}", wide)
        if "hi" in op and kind == "u32":
            return self.put(a[0], f"static_cast<uint64_t>({x}) * {y} >> 32", kind)
        if "lo" in op:
            unsigned = C_TYPES["u" + kind[1:]]
            return self.put(
                a[0], f"static_cast<{unsigned}>({x}) * static_cast<{unsigned}>({y})", kind
            )
        raise Unknown(".".join(op))

    def _mad(self, op: list[str], a: list[str], kind: str) -> str:
        if "wide" in op:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            x, y, z = (self.value(v, k) for v, k in zip(a[1:], (kind, kind, wide), strict=True))
            return self.put(a[0], f"static_cast<{C_TYPES[wide]}>({x}) * {y} + {z}", wide)
        if "lo" not in op:
            raise Unknown(".".join(op))
        x, y, z = (self.value(v, "u" + kind[1:]) for v in a[1:4])
        return self.put(a[0], f"{x} * {y} + {z}", kind)

    def _bfi(self, op: list[str], a: list[str], kind: str) -> str:
        what = [self.value(v, kind) for v in a[1:3]] + [self.value(v, "b32") for v in a[3:]]
        return self.put(a[0], f"insert_bits({', '.join(what)})", kind)

    def _popc(self, op: list[str], a: list[str], kind: str) -> str:
        return self.put(a[0], f"__builtin_popcount({self.value(a[1], kind)})", "u32")

    def _cvt(self, op: list[str], a: list[str], kind: str) -> str:
        to, source = op[-2], op[-1]
        if to in ("f16x2", "bf16x2"):  # the second goes to the lower half
            high, low = (f"to_{to[:-2]}({self.value(v, 'f32')})" for v in a[1:3])
            return f"{self.register(a[0])} = uint32_t{{{high}}} << 16 | {low};"
        x = self.value(a[1], source)
        if source in ("f16", "bf16"):
            return self.put(a[0], f"from_{source}({x})", to)
        if to in ("f16", "bf16"):
            return self.put(a[0], f"to_{to}({x})", to)
        if "rzi" in op or "rni" in op:
            whole = f"std::{'trunc' if 'rzi' in op else 'nearbyint'}({x})"
            return self.put(
                a[0], whole if to.startswith("f") else f"to_whole<{C_TYPES[to]}>({whole})", to
            )
        return self.put(a[0], x, to)

    # --------------------------------------------------------------------- where threads meet

    def meet(self, what: str, offer: str, code: str = "") -> str:
        """The thread offers a word and waits; what the others offered is in `w->offered`."""
        self.meetings += 1
        k = self.meetings
        return f"t->offer = {offer}; t->at = {k}; t->waits = {what}; return; meeting{k}:; {code}"

    def _bar(self, op: list[str], a: list[str], kind: str) -> str:
        return self.meet("for_warp" if op[1] == "warp" else "for_block", "0")

    def _shfl(self, op: list[str], a: list[str], kind: str) -> str:
        other = self.value(a[2], "b32")
        lane = {"down": f"t->id % 32 + {other}", "bfly": f"(t->id % 32) ^ {other}"}[op[2]]
        target = a[0].split("|")[0]
        take = f"{self.register(target)} = w->offered[({lane}) < 32 ? ({lane}) : t->id % 32];"
        return self.meet("for_warp", self.value(a[1], "b32"), take)

    def _redux(self, op: list[str], a: list[str], kind: str) -> str:
        if op[2] != "add":
            raise Unknown(".".join(op))
        return self.meet("for_warp", self.value(a[1], "b32"), f"{self.register(a[0])} = w->sum();")

    def matrices(self, op: list[str], registers: str, where: str, code: str) -> str:
        """Each lane has two neighbours of a row of each matrix, and says where one row is."""
        if op[3] != "m8n8" or op[5:] != ["shared", "b16"]:
            raise Unknown(".".join(op))
        line, lane, codes = len(self.lines), "t->id % 32", ""
        for i, register in enumerate(split(registers.strip("{} "))):
            row = f"w->offered[{8 * i} + {lane} / 4] + 4 * ({lane} % 4)"
            to = f"b->shared({row}, 4, {line})"
            codes += code.format(to=to, register=self.register(register))
        return self.meet("for_warp", f"static_cast<uint32_t>({self.address(where)})", codes)

    def _ldmatrix(self, op: list[str], a: list[str], kind: str) -> str:
        return self.matrices(op, a[0], a[1], "{register} = read<uint32_t>({to});")

    def _stmatrix(self, op: list[str], a: list[str], kind: str) -> str:
        return self.matrices(op, a[1], a[0], "write<uint32_t>({to}, {register});")

    def _vote(self, op: list[str], a: list[str], kind: str) -> str:
        result = "w->ballot()" if op[2] == "ballot" else "w->ballot() != 0"
        return self.meet("for_warp", self.value(a[1], "pred"), f"{self.register(a[0])} = {result};")

    def _bra(self, op: list[str], a: list[str], kind: str) -> str:
        return f"goto {a[0].replace('$', '')};"

    def _ret(self, op: list[str], a: list[str], kind: str) -> str:
        return "t->waits = for_nothing; return;"

    # ---------------------------------------------------------------------------------- output

    def source(self) -> str:
        jumps = "".join(f"case {k}: goto meeting{k};" for k in range(1, self.meetings + 1))
        code = "\n".join(self.lines)
        return f"""
namespace {{
struct T_{self.name} : Thread {{ {" ".join(self.registers)} }};
void run_{self.name}(T_{self.name}* t, Warp* w, Block* b, void** arguments) {{
switch (t->at) {{ case 0: break; {jumps} }}
{code}
t->waits = for_nothing;
}}
void all_{self.name}(void** arguments, unsigned blocks, unsigned threads) {{
  run_grid(run_{self.name}, arguments, "{self.name}", blocks, threads, {self.shared});
}}
const Launcher launch_{self.name}("{self.name}", all_{self.name});
}}
"""


def translate(ptx: str, dynamic: int = 0) -> str:
    """The C++ source of a module's kernels; `dynamic`: how much shared memory a launch adds."""
    symbols: dict[str, str] = {}
    tables = []
    ptx = re.sub(r"^\.extern (\.shared .*\[)\];", rf"\g<1>{dynamic}];", ptx, flags=re.M)
    table = r"^\.(?:global|const) \.align \d+ \.b8 (\w+)\[(\d+)\] = \{(.*?)\};"
    for name, size, values in re.findall(table, ptx, re.M):
        tables.append(f"alignas(16) const uint8_t {name}[{size}] = {{{values}}};")
        tables.append(f"const Known known_{name}({name}, {size});")
        symbols[name] = f"reinterpret_cast<uint64_t>({name})"
    outer = re.findall(r"^(\.shared \.align \d+ \.b8 (\w+)\[\d+\];)", ptx, re.M)
    kernels = []
    entry = r"\.entry (\w+)\((.*?)\)[^{]*\n\{\n(.*?)\n\}\n"
    for name, params, body in re.findall(entry, ptx, re.S):
        declared = "\n".join(text for text, variable in outer if variable in body)
        kernels.append(Kernel(name, params, declared + "\n" + body, symbols).source())
    return '#include "device.h"\n' + "\n".join(tables) + "".join(kernels)
