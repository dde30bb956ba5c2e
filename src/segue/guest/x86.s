# A guest of about one KiB: it counts PIT interrupts on COM1 and proves that its RAM is the same.
#
# What it prints and which commands it takes is documented in __init__.py; ./build assembles it.
#
# The ELF header is written out here and the linker emits a flat binary, so that no release of ld
# has a say in the bytes. It carries a multiboot header and a PVH note: QEMU takes the first that
# it knows, and both enter at `start` in flat 32-bit mode with paging and interrupts off.
#
# Interrupts are on in `wait` alone, and the handler leaves through wait's own return address
# instead of by iret: a KVM that emulates its guests may lack protected-mode iret. What the PIC
# cannot hold back meanwhile is a beat that comes late, never a number left out.

        .set    BASE,   0x100000
        .set    RING,   0x200000        # SLOTS pages, the first word of each in use
        .set    SLOTS,  256
        .set    STACK,  0x110000

        .set    COM1,   0x3f8
        .set    LSR,    COM1 + 5
        .set    FIFO,   16              # bytes that a 16550A takes when it says "empty"

        .set    HZ_DIVISOR, 1193        # of 1193182 Hz: 1000.15 interrupts a second

        .globl  start
        .text
        .code32
image:
        .ascii  "\177ELF"
        .byte   1, 1, 1, 0              # 32 bits, little endian, version 1
        .zero   8
        .word   2, 3                    # ET_EXEC, EM_386
        .long   1, start, segments - image, 0, 0
        .word   52, 32, 2, 40, 0, 0     # sizes and counts: two segments, no sections
segments:
        .long   1, 0, BASE, BASE, image_end - image, image_end - image, 7, 4096
        .long   4, note - image, note, note, note_end - note, note_end - note, 4, 4
note:
        .long   4, 4, 18                # XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point
        .asciz  "Xen"
        .long   start
note_end:
multiboot:
        .long   0x1badb002, 0, -0x1badb002

# ---------------------------------------------------------------- start
start:
        cli
        cld
        mov     $STACK, %esp
        lgdt    gdtr
        lidt    idtr
        ljmp    $8, $flat
flat:
        mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss

        call    draw_nonce
        call    fill_ring

        mov     $ports, %esi            # PIC, UART and PIT, from a table of (port, value)
1:      movzwl  (%esi), %edx
        mov     2(%esi), %al
        out     %al, %dx
        add     $3, %esi
        cmp     $ports_end, %esi
        jb      1b

        movl    $0x1ff, 0xfee000f0      # local APIC on, the PIC behind its LINT0: SeaBIOS does so
        movl    $0x700, 0xfee00350      # on pc and q35, nobody on microvm

        mov     $banner, %esi
        mov     $banner_end - banner, %ecx
        call    put
        call    say_nonce

main:
        call    wait
        call    listen
1:      mov     said, %eax
        cmp     ticks, %eax             # more than one is due after a wait for the UART
        je      main
        call    beat
        jmp     1b

# The nonce: TSC and time of day, mixed (the finalizer is MurmurHash3's), never zero.
draw_nonce:
        rdtsc
        lea     (%eax, %edx), %ebx
        mov     $rtc_registers, %esi
        mov     $4, %ecx
1:      lodsb
        out     %al, $0x70
        in      $0x71, %al
        imul    $0x01000193, %ebx, %ebx
        xor     %al, %bl
        loop    1b
        mov     %ebx, %eax
        shr     $16, %eax
        xor     %eax, %ebx
        imul    $0x85ebca6b, %ebx, %ebx
        mov     %ebx, %eax
        shr     $13, %eax
        xor     %eax, %ebx
        imul    $0xc2b2ae35, %ebx, %ebx
        mov     %ebx, %eax
        shr     $16, %eax
        xor     %eax, %ebx
        jnz     2f
        inc     %ebx
2:      mov     %ebx, nonce
        ret

# ---------------------------------------------------------------- time
wait:                                   # returns after the next tick
        sti
        hlt
        jmp     wait

on_tick:
        add     $12, %esp               # eip, cs and eflags: back to the caller of `wait`
        incl    ticks
        mov     $0x20, %al              # end of interrupt
        out     %al, $0x20
        ret

beat:
        incl    said
        call    turn_ring
        mov     said, %eax
        mov     $tick_digits, %edi
        call    decimal
        mov     $tick_line, %esi
        mov     $tick_line_end - tick_line, %ecx
        call    put
        mov     said, %eax
        xor     %edx, %edx
        mov     $1000, %ebx
        div     %ebx
        test    %edx, %edx
        jnz     1f
        call    say_nonce
1:      ret

say_nonce:
        mov     nonce, %eax
        mov     $nonce_digits, %edi
        mov     $8, %ecx
        call    hex
        mov     said, %eax
        mov     $nonce_tick_digits, %edi
        call    decimal
        mov     $nonce_line, %esi
        mov     $nonce_line_end - nonce_line, %ecx
        jmp     put

# ---------------------------------------------------------------- the ring in RAM
# Each beat checks the slot that was stamped SLOTS beats ago and stamps it anew: the whole ring
# is checked about four times a second, and a nonce or a counter that changed shows as well.
stamp:                                  # eax: a beat -> edx: its stamp, edi: its slot
        imul    $0x9e3779b1, %eax, %edx
        add     nonce, %edx
        mov     %eax, %edi
        and     $SLOTS - 1, %edi
        shl     $12, %edi
        add     $RING, %edi
        ret

fill_ring:
        mov     $1 - SLOTS, %eax
1:      call    stamp
        mov     %edx, (%edi)
        inc     %eax
        jle     1b
        ret

turn_ring:
        mov     said, %eax
        sub     $SLOTS, %eax
        call    stamp
        mov     (%edi), %ebx
        xor     %edx, %ebx
        add     $SLOTS, %eax
        call    stamp
        mov     %edx, (%edi)
        test    %ebx, %ebx
        jz      1f
        mov     $bad_digits, %edi
        call    decimal
        mov     $bad_line, %esi
        mov     $bad_line_end - bad_line, %ecx
        call    put
1:      ret

# ---------------------------------------------------------------- the UART
put:                                    # esi: bytes, ecx: how many; sleeps while nobody reads
        mov     $LSR, %dx
        in      %dx, %al
        test    $0x20, %al              # the transmit FIFO is empty
        jnz     1f
        call    wait
        jmp     put
1:      mov     %ecx, %ebx
        cmp     $FIFO, %ecx
        jbe     2f
        mov     $FIFO, %ecx
2:      sub     %ecx, %ebx
        mov     $COM1, %dx
        rep outsb
        mov     %ebx, %ecx
        test    %ecx, %ecx
        jnz     put
        ret

listen:                                 # at most a FIFO of input for each beat: a flood cannot
        mov     $FIFO, %ebp             # keep the guest from counting
1:      mov     $LSR, %dx
        in      %dx, %al
        test    $1, %al
        jz      3f
        mov     $COM1, %dx
        in      %dx, %al
        mov     %al, heard
        movzbl  %al, %eax
        mov     $got_digits, %edi
        mov     $2, %ecx
        call    hex
        mov     $got_line, %esi
        mov     $got_line_end - got_line, %ecx
        call    put
        mov     heard, %al
        mov     $commands, %esi
2:      cmp     %al, (%esi)
        je      4f
        add     $5, %esi
        cmp     $commands_end, %esi
        jb      2b
        dec     %ebp
        jnz     1b
3:      ret
4:      jmp     *1(%esi)

hex:                                    # eax as ecx digits at edi
1:      mov     %eax, %edx
        and     $15, %edx
        mov     hex_digits(%edx), %dl
        mov     %dl, -1(%edi, %ecx)
        shr     $4, %eax
        loop    1b
        ret

decimal:                                # eax modulo 10**8 as eight digits at edi
        mov     $8, %ecx
        mov     $10, %ebx
1:      xor     %edx, %edx
        div     %ebx
        add     $'0', %dl
        mov     %dl, -1(%edi, %ecx)
        loop    1b
        ret

# ---------------------------------------------------------------- commands
# Whatever a machine lacks is a write into the void; who is refused goes on counting.
power_off:
        mov     $0x604, %dx             # PM1a control, where SeaBIOS puts it on pc and q35
        mov     $0x2000, %ax            # sleep, type 0: S5 for QEMU
        out     %ax, %dx
        call    grace
        xor     %eax, %eax
        mov     $0x501, %dx             # isa-debug-exit, at its default port
        out     %al, %dx
        out     %al, $0xf4              # and where it is often put
        call    grace
        movb    $0x34, 0xfea00200       # microvm: the sleep register of its ACPI GED
        jmp     grace

reset:
        mov     $0xfe, %al
        out     %al, $0x64              # keyboard controller
        call    grace
        lidt    no_idt                  # microvm has none: triple fault
        ljmp    $0xfff8, $0             # (by a selector beyond the GDT; int3 needs a fuller KVM)

halt:
        cli
        hlt
        jmp     halt

panic:
        mov     $0x505, %dx
        mov     $1, %al
        out     %al, %dx

grace:                                  # 32 ticks for QEMU to act
        mov     $32, %ecx
1:      call    wait
        loop    1b
        ret

# ---------------------------------------------------------------- data
        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9a000000ffff      # 8: code, flat
        .quad   0x00cf92000000ffff      # 16: data, flat
gdtr:
        .word   gdtr - gdt - 1
        .long   gdt
idtr:
        .word   idt_end - idt - 1
        .long   idt
no_idt:
        .word   0
        .long   0
ports:
        .macro  port number, value
        .word   \number
        .byte   \value
        .endm
        port    0x20, 0x11              # both PICs: vectors from 32, only IRQ 0 let through
        port    0xa0, 0x11
        port    0x21, 32
        port    0xa1, 40
        port    0x21, 4
        port    0xa1, 2
        port    0x21, 1
        port    0xa1, 1
        port    0x21, 0xfe
        port    0xa1, 0xff
        port    COM1 + 1, 0             # no interrupts
        port    COM1 + 3, 0x80          # 115200 8n1
        port    COM1 + 0, 1
        port    COM1 + 1, 0
        port    COM1 + 3, 3
        port    COM1 + 2, 0xc7          # FIFOs on and empty
        port    COM1 + 4, 3             # DTR and RTS
        port    0x43, 0x34              # PIT channel 0: rate generator
        port    0x40, HZ_DIVISOR & 255
        port    0x40, HZ_DIVISOR >> 8
ports_end:
commands:
        .macro  command letter, routine
        .ascii  "\letter"
        .long   \routine
        .endm
        command q, power_off
        command r, reset
        command h, halt
        command p, panic
commands_end:
rtc_registers:
        .byte   0, 2, 4, 7              # second, minute, hour, day
hex_digits:
        .ascii  "0123456789abcdef"
banner:
        .ascii  "\r\nsegue guest x86 1\r\n"
banner_end:
tick_line:
        .ascii  "tick "
tick_digits:
        .ascii  "00000000\r\n"
tick_line_end:
nonce_line:
        .ascii  "nonce "
nonce_digits:
        .ascii  "00000000 tick "
nonce_tick_digits:
        .ascii  "00000000\r\n"
nonce_line_end:
bad_line:
        .ascii  "BAD tick "
bad_digits:
        .ascii  "00000000\r\n"
bad_line_end:
got_line:
        .ascii  "got "
got_digits:
        .ascii  "00\r\n"
got_line_end:
heard:
        .byte   0
        .balign 8
nonce:
        .long   0
ticks:                                  # interrupts so far
        .long   0
said:                                   # the last one that was printed
        .long   0
        .balign 8
idt:
        .zero   32 * 8                  # an exception is a triple fault: the guest starts anew
        .word   on_tick - image + (BASE & 0xffff), 8, 0x8e00, BASE >> 16
idt_end:
image_end:
