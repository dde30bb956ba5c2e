// The package's x86 guest (src/segue/guest) again, for `-M virt`: same output, same commands.
//
//     qemu-system-aarch64 -M virt -cpu cortex-a57 -m 64 -kernel guest.bin ...
//
// A Linux image as far as QEMU can tell (the 64-byte header), position-independent, at EL1 with
// the MMU off, so that every access must be aligned. GICv2 (virt's default), no EL2 or EL3.
//
// Time is the virtual timer's interrupt 27 through the GIC. It stays masked in PSTATE: a pending
// interrupt ends `wfi` all the same, so no vectors are needed. CVAL moves by exactly one period a
// tick: a late host means a late line, and the guest catches up.

        .set    UART,   0x09000000
        .set    RTC,    0x09010000
        .set    GICD,   0x08000000
        .set    GICC,   0x08010000
        .set    DR,     0x00
        .set    FR,     0x18
        .set    TIMER,  27
        .set    RING,   0x200000        // from the image; SLOTS pages, a word in each
        .set    SLOTS,  256
        .set    STACK,  0x100000        // from the image, downwards
        .set    HEARS,  16              // bytes of input for each beat

        .text
image:
        b       start
        .long   0
        .quad   0x80000                 // text offset
        .quad   0x400000                // size, with stack and ring
        .quad   0, 0, 0, 0
        .ascii  "ARM\x64"
        .long   0

// x19: variables   x20: UART   x21: GICC   x22: image
start:
        adr     x19, variables
        adr     x22, image
        add     x1, x22, STACK
        mov     sp, x1
        mov     x20, UART
        mov     x21, GICC
        msr     daifset, 15

        // The nonce: counter, clock and the seeds in the device tree (x0), hashed, never zero.
        mrs     x2, cntvct_el0
        mov     x1, RTC
        ldr     w3, [x1]
        add     x2, x2, x3, lsl 32
        ldr     x4, fnv_prime
        add     x5, x0, 0x10000
1:      ldr     x3, [x0], 8
        eor     x2, x2, x3
        mul     x2, x2, x4
        cmp     x0, x5
        b.lo    1b
        eor     x2, x2, x2, lsr 32
        cmp     w2, 0
        cinc    w2, w2, eq
        str     w2, [x19, nonce - variables]
        str     xzr, [x19, ticks - variables]

        mov     w0, 1 - SLOTS
1:      bl      stamp
        str     w1, [x2]
        add     w0, w0, 1
        cmp     w0, 0
        b.le    1b

        str     wzr, [x20, 0x30]        // CR: off
        mov     w0, 0x70
        str     w0, [x20, 0x2c]         // LCR_H: 8 bits, FIFOs on
        str     wzr, [x20, 0x38]        // IMSC: no interrupts
        mov     w0, 0x301
        str     w0, [x20, 0x30]         // CR: on, both ways

        mov     x1, GICD
        mov     w0, 1
        str     w0, [x1]
        lsl     w2, w0, TIMER
        str     w2, [x1, 0x100]         // ISENABLER0
        mov     w2, 0xff
        str     w2, [x21, 4]            // PMR
        str     w0, [x21]

        mrs     x0, cntfrq_el0
        mov     x1, 1000
        udiv    x0, x0, x1
        str     x0, [x19, period - variables]
        mrs     x1, cntvct_el0
        add     x1, x1, x0
        msr     cntv_cval_el0, x1
        mov     x0, 1
        msr     cntv_ctl_el0, x0
        isb

        adr     x0, banner
        mov     w1, banner_end - banner
        bl      put
        bl      say_nonce

main:
        bl      wait
        bl      listen
1:      ldp     w0, w1, [x19, ticks - variables]
        cmp     w0, w1
        b.eq    main
        bl      beat
        b       1b

// ---------------------------------------------------------------- time
wait:                                   // returns after the next tick; changes x9 to x11 alone
        wfi
        ldr     w9, [x21, 0xc]          // IAR
        and     w10, w9, 0x3ff
        cmp     w10, TIMER
        b.ne    wait
        mrs     x10, cntv_cval_el0
        ldr     x11, [x19, period - variables]
        add     x10, x10, x11
        msr     cntv_cval_el0, x10
        isb
        str     w9, [x21, 0x10]         // EOIR
        ldr     w9, [x19, ticks - variables]
        add     w9, w9, 1
        str     w9, [x19, ticks - variables]
        ret

beat:
        str     x30, [sp, -16]!
        ldr     w12, [x19, said - variables]
        add     w12, w12, 1
        str     w12, [x19, said - variables]
        sub     w0, w12, SLOTS
        bl      stamp
        ldr     w13, [x2]
        sub     w13, w13, w1
        mov     w0, w12
        bl      stamp
        str     w1, [x2]
        cbz     w13, 1f
        adr     x1, bad_digits
        bl      decimal
        adr     x0, bad_line
        mov     w1, bad_line_end - bad_line
        bl      put
1:      mov     w0, w12
        adr     x1, tick_digits
        bl      decimal
        adr     x0, tick_line
        mov     w1, tick_line_end - tick_line
        bl      put
        mov     w0, 1000
        udiv    w1, w12, w0
        msub    w1, w1, w0, w12
        ldr     x30, [sp], 16
        cbz     w1, say_nonce
        ret

say_nonce:
        str     x30, [sp, -16]!
        ldr     w0, [x19, nonce - variables]
        adr     x1, nonce_digits
        mov     w2, 8
        bl      hex
        ldr     w0, [x19, said - variables]
        adr     x1, nonce_tick_digits
        bl      decimal
        adr     x0, nonce_line
        mov     w1, nonce_line_end - nonce_line
        ldr     x30, [sp], 16
        b       put

stamp:                                  // w0: a beat -> w1: its stamp, x2: its slot in the ring
        ldr     w1, golden
        mul     w1, w1, w0
        ldr     w2, [x19, nonce - variables]
        add     w1, w1, w2
        and     w2, w0, SLOTS - 1
        add     x2, x22, x2, lsl 12
        add     x2, x2, RING
        ret

// ---------------------------------------------------------------- the UART
put:                                    // x0: bytes, w1: how many; sleeps while nobody reads
        mov     x7, x30
1:      ldr     w2, [x20, FR]
        tbz     w2, 5, 2f               // TXFF
        bl      wait
        b       1b
2:      ldrb    w2, [x0], 1
        str     w2, [x20, DR]
        subs    w1, w1, 1
        b.ne    1b
        ret     x7

listen:
        str     x30, [sp, -16]!
        mov     w14, HEARS
1:      ldr     w0, [x20, FR]
        tbnz    w0, 4, 2f               // RXFE
        ldr     w15, [x20, DR]
        and     w15, w15, 0xff
        mov     w0, w15
        adr     x1, got_digits
        mov     w2, 2
        bl      hex
        adr     x0, got_line
        mov     w1, got_line_end - got_line
        bl      put
        cmp     w15, 'q'
        b.eq    power_off
        cmp     w15, 'r'
        b.eq    reset
        cmp     w15, 'h'
        b.eq    halt
        subs    w14, w14, 1
        b.ne    1b
2:      ldr     x30, [sp], 16
        ret

hex:                                    // w0 as w2 digits at x1
        adr     x3, hex_digits
        sub     x1, x1, 1
1:      and     x4, x0, 15
        ldrb    w4, [x3, x4]
        strb    w4, [x1, x2]
        lsr     w0, w0, 4
        subs    w2, w2, 1
        b.ne    1b
        ret

decimal:                                // w0 modulo 10**8 as eight digits at x1
        mov     w2, 8
        mov     w3, 10
        sub     x1, x1, 1
1:      udiv    w4, w0, w3
        msub    w5, w4, w3, w0
        add     w5, w5, '0'
        strb    w5, [x1, x2]
        mov     w0, w4
        subs    w2, w2, 1
        b.ne    1b
        ret

// ---------------------------------------------------------------- commands
power_off:
        ldr     w0, psci_off
        hvc     0
        b       halt
reset:
        ldr     w0, psci_reset
        hvc     0
halt:                                   // no interrupt is enabled: nothing ends this wfi
        msr     cntv_ctl_el0, xzr
        wfi
        b       halt

// ---------------------------------------------------------------- data
        .balign 8
fnv_prime:
        .quad   0x100000001b3
psci_off:
        .long   0x84000008
psci_reset:
        .long   0x84000009
golden:
        .long   0x9e3779b1
        .balign 8
variables:
period: .quad   0                       // of the counter, for a millisecond
ticks:  .long   0                       // interrupts so far
said:   .long   0                       // the last one that was printed
nonce:  .long   0
hex_digits:
        .ascii  "0123456789abcdef"
banner:
        .ascii  "\r\nsegue guest aarch64 1\r\n"
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
