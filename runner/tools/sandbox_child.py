"""The inside of the sandbox: takes its limits, shuts out what it must not do, then runs what stands on standard input.

Started by its path with `python -I -S`: it imports nothing of the project.
"""

import ctypes
import platform
import resource
import struct
import sys
import traceback

# Numbers of system calls: socket, setsid, setpgid, ptrace, kill, tkill, tgkill, process_vm_writev, io_uring_setup,
# pidfd_send_signal, prlimit64
DENIED = {
    "x86_64": (0xC000003E, (41, 112, 109, 101, 62, 200, 234, 311, 425, 424, 302)),
    "aarch64": (0xC00000B7, (198, 157, 154, 117, 129, 130, 131, 271, 425, 424, 261)),
}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_PDEATHSIG, FILTER = 38, 22, 1, 2
LOAD, JUMP_EQUAL, JUMP_ABOVE, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # REFUSE: EPERM
X32 = 0x40000000  # numbers from here on are another table of the same calls


def shut_out() -> None:
    """A filter of system calls (seccomp) for this process and its children, which they cannot take off."""
    arch, numbers = DENIED[platform.machine()]
    program = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    program += [(JUMP_ABOVE, 0, 1, X32), (RETURN, 0, 0, REFUSE)]
    for number in numbers:
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    program.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_PDEATHSIG, 9), (PR_SET_NO_NEW_PRIVS, 1), (PR_SET_SECCOMP, FILTER, ctypes.c_char_p(head))):
        padded = (*arguments, *(ctypes.c_ulong(0) for _ in range(5 - len(arguments))))
        if libc.prctl(*padded) != 0:
            sys.exit(f"the sandbox cannot be closed (prctl {arguments[0]}: errno {ctypes.get_errno()}), so nothing was run")


def limit(memory: int, seconds: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main() -> None:
    code = sys.stdin.buffer.read().decode("utf-8", "replace")
    limit(int(sys.argv[1]), int(sys.argv[2]))
    shut_out()
    sys.argv = ["code.py"]
    try:
        exec(compile(code, "code.py", "exec"), {"__name__": "__main__"})
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc(limit=-3, file=sys.stdout)
    sys.stdout.flush()


main()
